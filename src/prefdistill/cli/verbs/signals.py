"""`prefdistill signals`."""

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from prefdistill.cli.flags import flag_of
from prefdistill.cli.output import show
from prefdistill.cli.verbs.common import PAIRS
from prefdistill.core.errors import UserError
from prefdistill.data.options import Lengths
from prefdistill.models.options import Placement, ReadWith
from prefdistill.signals.options import ExtractRequest


class SignalFlags(ExtractRequest, ReadWith, Lengths):
    out: Path = Field(description="Directory of the signal store.")
    model: str | None = Field(None, description="Hub name or directory of the model to compute signals with.")
    data: str | None = Field(None, description=PAIRS)
    ids_from: Path | None = Field(None, description="Score at the token ids of this teacher's topk store.")
    repair: bool = Field(
        False,
        description="Rebuild the damaged files of --out with the options of the store; --model, --data, --tokenizer "
        "and --chat-template only if they have moved, --base-url for a served teacher.",
    )

    def check_engine(self) -> None:
        if not self.repair:  # which uses the options of the store
            super().check_engine()

    @model_validator(mode="after")
    def _required(self) -> "SignalFlags":
        if self.repair:
            moved = {"model", "gguf_file", "data", "tokenizer", "chat_template", "ids_from", *Placement.model_fields}
            allowed = {"repair", "out", *moved, "base_url", "trust_remote_code"}
            if extra := sorted(self.model_fields_set - allowed):
                raise ValueError(f"--repair uses the options of the store; leave {flag_of(SignalFlags, extra[0])} out")
        elif self.model is None or self.data is None:
            raise ValueError(f"--{'data' if self.model else 'model'} is required")
        return self


def signals(options: SignalFlags) -> dict[str, Any]:
    """Compute and store what a model says about each response: soft values of every state (values, from raw logits, or
    logprob_values), log-probability of the response (logps), its raw logits (q), the most likely tokens (topk).

    Example: prefdistill signals --model my/teacher --data pairs.jsonl --out signals/teacher --kind topk --k 50
    or, to rebuild damaged files: prefdistill signals --repair --out signals/teacher
    """
    from prefdistill.data.truncation import Truncation
    from prefdistill.evaluation.pairs import gauge_flips
    from prefdistill.signals import Signals, extract_signals, repair_signals

    out, ids_from = options.out, Signals.open(options.ids_from) if options.ids_from else None
    trust, model = options.trust_remote_code, options.place(options.model) if options.model else None
    if options.repair:
        store, damaged = repair_signals(
            out,
            model,
            options.data,
            options.tokenizer,
            chat_template=options.chat_template,
            ids_from=ids_from,
            base_url=options.base_url,
            trust_remote_code=trust,
            placement=Placement(**options.part(Placement)),
        )
        show("\n".join([f"rebuilt: {name}" for name in damaged] or [f"{out} is whole"]))
        return {"out": str(out), "damaged": damaged, "pairs": len(store.rows), "rows": len(store)}
    assert model is not None
    assert options.data is not None
    store = extract_signals(
        model,
        options.data,
        _tokenizer(options, model),
        out=out,
        truncation=Truncation(**options.part(Lengths)),
        ids_from=ids_from,
        **options.part(ExtractRequest),
    )
    size = sum(path.stat().st_size for path in (out / "shards").iterdir())
    show(f"{len(store.rows)} of {len(store)} rows, {', '.join(store.kinds)}, {size:,} bytes in {out}")
    results = {"out": str(out), "pairs": len(store.rows), "rows": len(store), "kinds": list(store.kinds), "bytes": size}
    if error := store.manifest["topk"].get("kl_error"):
        results["kl_error"] = error
        show(f"top-k compression error: KL {error['mean']:.1e} nats on average ({error['max']:.1e} at most)")
    if "values" in store.kinds and options.positions == "all" and {"chosen", "rejected"} <= set(store.responses):
        results["gauge_flips"] = flips = gauge_flips(store)
        show(
            f"{flips['mean']:.0%} of pair orderings by V flip under logit offsets that leave the policy unchanged "
            f"(± {flips['se']:.1%} over {flips['n']} random ones; 50% = V carries no policy information)"
        )
    return results


def _tokenizer(options: SignalFlags, model: str) -> Any:
    from prefdistill.models.vocabulary import tokenizer_for

    try:
        return tokenizer_for(model, options.tokenizer, options.form, trust_remote_code=options.trust_remote_code)
    except UserError as error:
        if options.engine == "openai" and options.tokenizer is None:
            raise UserError(f"{error}; name the tokenizer of the served model with --tokenizer") from error
        raise
