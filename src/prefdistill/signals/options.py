"""Options of signals: what is stored of a model's outputs, and how."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from prefdistill.core.errors import UserError
from prefdistill.core.options import NO_FLAG, NOT_IN_KEY, Flag, OnWorkers
from prefdistill.data.options import Columns
from prefdistill.models.options import Calling, Dtype, Placement, Quantization, QuantizedLoading, Trust
from prefdistill.signals.kind_registry import KINDS, Settings

Role = Literal["teacher", "teacher_reference", "reference", "student"]


class SignalOptions(Placement):
    """How the signals of a run are extracted."""

    dtype: Dtype | None = Field(
        None,
        description="dtype of the weights while signals are extracted; default: float32 for a reference, else bfloat16 "
        "where the hardware multiplies it fast, else as stored.",
    )
    quantization: Quantization | None = QuantizedLoading.redefault("quantization", None)
    positions: Literal["all", "endpoints"] = Field(
        "all",
        description="Values of all states, or of the first and the last only, which TVKD needs with discount 1. In a "
        "run: of the training pairs.",
    )
    value_dtype: Literal["float32", "float16"] = Field(
        "float32", description="Storage of the values of all states; float16 is half the size."
    )
    topk_coding: Literal["packed", "float32"] | None = Field(
        None,
        description="Storage of topk: packed (2.5 bytes per id) or float32 (exact); default: exact for k=vocab.",
    )
    value_temperature: PositiveFloat = Field(1.0, description="b of the soft value b*logsumexp(z/b).")
    k: PositiveInt | Literal["vocab"] = Field(
        50, description="Tokens kept of each distribution, the most likely ones; vocab is all of them."
    )
    p: float | None = Field(
        None, gt=0, le=1, description="Top-p cut-off within the k: keep the most likely tokens up to this probability."
    )
    batch_tokens: PositiveInt = Field(16_384, description="Padded tokens per forward pass.")


class RecipeSignals(SignalOptions, OnWorkers):
    """How a recipe extracts signals, and where."""

    engine: Annotated[Literal["transformers", "ray"], NOT_IN_KEY] = Field(
        "transformers",
        description="transformers, in the process of the run or those that launch.signals starts; or ray, workers on "
        "the machines of a Ray cluster, for which the run's directory is on storage that all of them share.",
    )

    @model_validator(mode="after")
    def _workers_of_ray(self) -> "RecipeSignals":
        if self.workers is not None and self.engine != "ray":
            raise ValueError("workers applies to the engine ray; leave it out, or set engine=ray")
        return self


class SignalRequest(SignalOptions, Trust, Columns):
    """Which signals of a model are stored, and how; the same for stored and live ones."""

    kinds: Annotated[tuple[str, ...], Flag("--kind")] = Field(
        ("values", "logps"), strict=False, description=f"Comma-separated: {', '.join(KINDS)}."
    )
    role: Role = Field(
        "teacher",
        description="Which model the signals are computed from: teacher, teacher_reference, reference (the student's "
        "start) or student (a trained one).",
    )
    responses: tuple[str, ...] = Field(
        ("chosen", "rejected"),
        strict=False,
        description="Comma-separated columns to score, e.g. student_response of `prefdistill sample`.",
    )
    bf16: bool = Field(False, description="bfloat16 autocast, as in a bf16 training run.")
    shard_rows: Annotated[PositiveInt, NO_FLAG] = Field(1_024, description="Pairs per file, the unit of resuming.")

    @model_validator(mode="after")
    def _consistent(self) -> "SignalRequest":
        from prefdistill.signals.kinds import make_kinds

        if not self.kinds:
            raise ValueError("kinds is empty; name at least one, e.g. values")
        if not self.responses or len(set(self.responses)) < len(self.responses):
            names = ", ".join(self.responses) or "none"
            raise ValueError(f"responses must name columns of the data, each once, got {names}")
        try:
            kinds = make_kinds(self.kinds, Settings(value_temperature=self.value_temperature))
            for kind in kinds:
                kind.check()
        except UserError as error:
            raise ValueError(str(error)) from error
        used = {option for kind in kinds for option in kind.uses}
        if self.positions == "endpoints" and set(self.kinds) != {"values"}:
            others = ", ".join(sorted({*self.kinds} - {"values"})) or "no values"
            raise ValueError(f"positions=endpoints stores values alone, not {others}; use another store for them")
        if self.value_dtype == "float16" and (self.positions == "endpoints" or "value_dtype" not in used):
            raise ValueError("value_dtype applies to values of all states; leave it out")
        if (self.k, self.p) != (50, None) and not {"k", "p"} <= used:
            raise ValueError("k and p apply to the kind topk; leave them out without it")
        if self.topk_coding is not None and "topk_coding" not in used:
            raise ValueError("topk_coding applies to the kind topk; leave it out without it")
        if self.quantization is not None and self.role == "reference":
            raise ValueError("a reference is scored as the student is trained; leave quantization out")
        return self


class ExtractRequest(SignalRequest, OnWorkers, Calling):
    """Everything that `extract_signals` takes but the model, the data and the output directory."""

    engine: Annotated[Literal["transformers", "ray", "openai"], NOT_IN_KEY] = Field(
        "transformers",
        description="transformers, in this process and those of its launcher; ray, workers on the machines of a Ray "
        "cluster, for which --out is on storage that all of them share; or openai, a teacher behind an endpoint that "
        "returns log-probabilities of prompts, as vLLM does: logps, token_logps, topk.",
    )
    base_url: Annotated[str | None, NOT_IN_KEY] = Field(
        None,
        description="Base URL of the engine openai, e.g. http://localhost:8000/v1; --model is the model's name there. "
        "Its key, if it needs one, is read from the environment: PREFDISTILL_TEACHER_KEY, else OPENAI_API_KEY.",
    )

    @model_validator(mode="after")
    def _engine_uses(self) -> "ExtractRequest":
        self.check_engine()
        return self

    def check_engine(self) -> None:
        """Raise a ValueError if an option is of another engine, or one that a server cannot follow."""
        fields = type(self).model_fields.items()
        changed = {
            name for name, field in fields if getattr(self, name) != field.get_default(call_default_factory=True)
        }
        only = {"ray": {"workers"}, "openai": {"base_url", *Calling.model_fields}}
        for engine, names in only.items():
            if self.engine != engine and (wrong := sorted(names & changed)):
                raise ValueError(f"{wrong[0]} applies to the engine {engine}; leave it out")
        if self.engine == "openai":
            self._check_served(changed)

    def _check_served(self, changed: set[str]) -> None:
        from prefdistill.signals.kinds import make_kinds

        if self.base_url is None:
            raise ValueError("base_url is required by the engine openai, e.g. http://localhost:8000/v1")
        kinds = make_kinds(KINDS, Settings(value_temperature=2.0))
        if wrong := [kind.name for kind in kinds if kind.needs_logits and kind.name in self.kinds]:
            available = ", ".join(kind.name for kind in kinds if not kind.needs_logits)
            raise ValueError(
                f"a server gives log-probabilities of tokens, and no logits, which {', '.join(wrong)} need; it can "
                f"give {available}. Use the engine transformers for the others"
            )
        if self.role not in ("teacher", "teacher_reference"):
            raise ValueError(
                f"a {self.role} is compared by its weights, which a server does not show; use another engine"
            )
        if self.k == "vocab":
            raise ValueError("k=vocab is more than a server returns; give a number")
        if wrong := sorted({"dtype", "quantization", "bf16", "batch_tokens", *Placement.model_fields} & changed):
            raise ValueError(f"{wrong[0]} is for the server to decide; leave it out with the engine openai")
