"""The token view: one page that shows the stored signals of each pair's responses token by token."""

import base64
import hashlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from prefdistill import __version__
from prefdistill.core.errors import UserError
from prefdistill.core.paths import check_file
from prefdistill.data.columns import SIDES
from prefdistill.data.load import load_pairs
from prefdistill.data.options import Columns
from prefdistill.data.template import end_token_ids
from prefdistill.data.truncation import Truncation
from prefdistill.models.load import load_tokenizer
from prefdistill.models.vocabulary import stored_tokenizer
from prefdistill.report.format import form_text, printable
from prefdistill.report.own_tokens import NO_ID, OwnTokens, store_with_own_tokens
from prefdistill.report.packed import BLOCK, deflated_json, width_of
from prefdistill.report.page import PAGE, environment, save_page
from prefdistill.report.token_data import MARGINS, Field, Texts, Weights, fields_of, has, packed, positions, short
from prefdistill.signals.join import Joined, join
from prefdistill.signals.needs import ROLES, TEACHERS, Need
from prefdistill.signals.store import Signals, SignalSet

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

MOST_PAIRS = 5_000
MODELS = {  # placeholders in commands
    "teacher": "TEACHER",
    "teacher_reference": "TEACHER_SFT_MODEL",
    "reference": "STUDENT",
    "student": "TRAINED_STUDENT",
}


def write_token_view(
    data: "str | Dataset",
    signals: Sequence[Signals],
    out: str | Path,
    tokenizer: "PreTrainedTokenizerBase | str | None" = None,
    *,
    max_pairs: int = MOST_PAIRS,
    weights: Weights | None = None,
    columns: Columns | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    r"""Write the token view of some pairs to one HTML file that loads nothing from elsewhere.

    .. math:: \psi_t = \gamma V(s_{t+1}) - V(s_t), \qquad \Psi(y) = \sum_t \psi_t

    Args:
        data: the preference pairs that the signals were computed from, or where to load them from.
        signals: stores for these pairs. The page offers what they hold, and names the rest.
        out: the file.
        tokenizer: the student's, or its name. Default: the one that a store of the student names, or else the first
            store. Stores of a teacher with other tokens are aligned to it, and the page shows both.
        max_pairs: the page holds the first of them.
        columns: how the columns of data given by name are read.
        weights: alpha and beta of the margins, discount and terminal of psi.

    Returns:
        `{"out", "pairs", "rows", "bytes", "shows"}`: pairs on the page, rows of the data, what colours tokens.

    Raises:
        UserError: if a store is of other data or tokens, no pair has signals, or the file cannot be written.

    Example:
        >>> write_token_view("pairs.jsonl", [Signals.open("signals/teacher")], "tokens.html")     # doctest: +SKIP
    """
    weights = weights or Weights()
    check_file(Path(out), PAGE, "inspect")
    if not signals:
        raise UserError("no signals: give a store with --signals DIR (`prefdistill signals` extracts one)")
    name = data if isinstance(data, str) else signals[0].manifest["data"]["name"]
    pairs = load_pairs(data, **(columns or Columns()).part(Columns)) if isinstance(data, str) else data
    if tokenizer is None or isinstance(tokenizer, str):
        tokenizer = _tokenizer_of(signals, tokenizer, trust_remote_code)
    joined = join(signals, pairs, tokenizer, responses=SIDES)
    available, truncation = joined.signals, joined.truncation
    shown = available.at(available.rows[:max_pairs])
    texts = Texts.of(shown, tokenizer, truncation)
    fields = fields_of(shown)
    teacher = store_with_own_tokens(signals, tokenizer)
    own = OwnTokens.of(teacher, shown, tokenizer, truncation, texts.table) if teacher else None
    index, blocks, pieces, scales = packed(shown, texts, fields, weights, own)
    modes = _modes(fields, scales)
    page = {
        "sides": SIDES,
        "block": BLOCK,
        "width": width_of(len(pieces)),
        "fields": [field.manifest() for field in fields],
        "modes": modes,
        "weights": {name: getattr(weights, name) for name in Weights.model_fields},
        "kept": {field.role: _kept(shown, field.role) for field in fields if field.source == "topk"},
        "own": own and own.about(),
    }
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= end_token_ids(tokenizer)
    table = {
        "ids": [token for token, _ in pieces],
        "texts": [text for _, text in pieces],
        "special": [i for i, (token, _) in enumerate(pieces) if token in special],
        "names": {
            i: tokenizer.convert_ids_to_tokens(token)
            for i, (token, text) in enumerate(pieces)
            if not text and token != NO_ID
        },
    }
    templates = environment()
    script, style = (templates.get_template(file).render() for file in ("tokens.js", "tokens.css"))
    html = templates.get_template("tokens.html.j2").render(
        page=page,
        about=_about(name, shown, joined, own, signals),
        missing=_missing(shown, name),
        count=len(index["row"]),
        version=__version__,
        script=Markup(script),
        style=Markup(style),
        script_hash=_csp_hash(script),
        style_hash=_csp_hash(style),
        index=Markup(deflated_json(index)),
        pieces=Markup(deflated_json(table)),
        blocks=[Markup(text) for text in blocks],
    )
    save_page(printable(html), Path(out), "the token view")
    return {
        "out": str(out),
        "pairs": len(shown.rows),
        "rows": len(pairs),
        "bytes": Path(out).stat().st_size,
        "shows": [mode["key"] for mode in modes],
    }


def _tokenizer_of(signals: Sequence[Signals], name: str | None, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    """Load the student's tokenizer, in the form of its store if it is that one."""
    store = next((store for store in signals if store.role not in TEACHERS), signals[0])
    stored = store.manifest["tokenizer"]
    if name is not None:
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        if not store.has_tokens_of(tokenizer):
            return tokenizer
    elif not stored["name"]:
        raise UserError("the signals do not name their tokenizer; give it with --tokenizer")
    try:
        return stored_tokenizer(stored, name=name, trust_remote_code=trust_remote_code)
    except UserError as error:
        raise UserError(f"{error}\n(the signals name this tokenizer; give its place with --tokenizer)") from None


# -- words -------------------------------------------------------------------------------------------------------------


def _modes(fields: list[Field], scales: dict[str, float]) -> list[dict[str, Any]]:
    """Return what tokens can be coloured by. `signed`: whether zero is in the middle of the scale or at its end."""
    modes: list[dict[str, Any]] = []
    for number, field in enumerate(fields):
        if field.path:
            of = "" if field.kind == "values" else " of log-probabilities"
            modes += [
                {"key": f"{field.kind}.psi", "show": "psi", "field": number, "label": f"ψ{of}", "signed": True},
                {"key": f"{field.kind}.V", "show": "V", "field": number, "label": f"V{of}", "signed": True},
            ]
        else:
            label = f"log-prob, {field.role.replace('_', ' ')}"
            modes.append(
                {"key": f"{field.role}.logp", "show": "logp", "field": number, "label": label, "signed": False}
            )
    place = {field.role: number for number, field in enumerate(fields) if not field.path}
    for a, b in MARGINS:
        if a in place and b in place:
            label = f"log-ratio, {a} to {b.replace('_', ' ')}"
            both = {"field": place[a], "base": place[b]}
            modes.append({"key": f"{a}.ratio", "show": "ratio", **both, "label": label, "signed": True})
    return [mode | {"scale": short(scales[mode["key"]])} for mode in modes]


def _kept(signals: SignalSet, role: str) -> str:
    """Return which tokens of each distribution a store has, in words."""
    topk = signals.store(role, "topk", SIDES[0]).manifest["topk"]
    if "k" not in topk:
        return "those of the teacher's store"
    return "all" if topk["k"] == "vocab" else f"the {topk['k']} most likely"


def _about(
    name: str, signals: SignalSet, joined: Joined, own: OwnTokens | None, unaligned: Sequence[Signals]
) -> dict[str, Any]:
    """Return the head of the page: name, facts and notes; `unaligned` are the stores as they were given."""
    manifest, rows = signals.stores[0].manifest, len(signals.data)
    lengths = manifest["truncation"]
    facts = []
    for role in ROLES:
        stores = [store for store in signals.stores if store.role == role]
        if stores:
            model = stores[0].manifest["model"].get("name") or "a model in memory"
            kinds = ", ".join(dict.fromkeys(kind for store in stores for kind in store.kinds))
            read_with = stores[0].manifest.get("aligned", stores[0].manifest)["tokenizer"]
            form = form_text(read_with.get("form", {}))
            facts.append((role.replace("_", " "), f"{model} ({kinds}{'; read ' if form else ''}{form})"))
    facts.append(("tokenizer", manifest["tokenizer"]["name"] or "not named"))
    if own:
        share = own.about()["shared"]
        facts.append(("teacher's tokenizer", f"{own.tokenizer}; it shares {share:.0%} of the student's states here"))
    facts.append(("max_length", str(lengths["max_length"] or "none")))
    if lengths["max_prompt_length"]:
        facts.append(("max_prompt_length", str(lengths["max_prompt_length"])))
    left = len(joined.signals.rows) - len(signals.rows)
    dropped = rows - len(joined.signals.rows)
    notes = []
    if dropped:
        reasons = dict.fromkeys(reason for store in signals.stores for reason in store.manifest["dropped"]["reasons"])
        notes.append(f"{dropped:,} of {rows:,} rows have no signals ({'; '.join(reasons)}).")
    before, after = (
        {(store.role, kind) for store in part for kind in store.kinds} for part in (unaligned, signals.stores)
    )
    if before - after:
        kinds = ", ".join(f"{kind} of the {role.replace('_', ' ')}" for role, kind in sorted(before - after))
        notes.append(f"Not shown, because it is of other tokens than the student's: {kinds}.")
    if left:
        notes.append(f"The first {len(signals.rows):,} pairs; {left:,} more are left out (--max-pairs).")
    return {"name": name, "facts": facts, "notes": notes}


def _missing(signals: SignalSet, data: str) -> list[dict[str, str]]:
    """Return what the page could show if it were stored, and the command that extracts it."""
    manifest = signals.stores[0].manifest
    models = {store.role: store.manifest["model"].get("name") for store in signals.stores}
    read_with = {s.role: s.manifest.get("aligned", s.manifest)["tokenizer"] for s in signals.stores}

    def command(role: str, kind: str) -> str:
        parts = ["prefdistill", "signals", "--model", models.get(role) or MODELS[role], "--data", data]
        parts += [] if role == "teacher" else ["--role", role]
        parts += ["--kind", kind]
        like = "teacher" if role in TEACHERS and role not in read_with else role
        for option, value in read_with.get(like, {}).get("form", {}).items():
            text = ",".join(f"{k}={json.dumps(v)}" for k, v in value.items()) if isinstance(value, dict) else value
            parts += [f"--{option.replace('_', '-')}", text]
        for option, value in manifest["truncation"].items():
            if value is not None and (option, value) != ("max_length", Truncation().max_length):
                parts += [f"--{option.replace('_', '-')}", str(value)]
        return shlex.join([*parts, "--out", f"signals/{role.replace('_', '-')}-{kind}"])

    missing = []
    has_values = has(signals, Need("teacher", "values"))
    if not has_values or positions(signals, "values") != {"all"}:
        what = "V and ψ of every token" + (" (these signals hold the endpoints only)" if has_values else "")
        missing.append({"what": what, "command": command("teacher", "values")})
    if not any(has(signals, Need("teacher", kind)) for kind in ("token_logps", "topk")):
        what = "the teacher's log-probability of each token"
        missing.append({"what": what, "command": command("teacher", "token_logps")})
    for role, what in (
        ("teacher", "the teacher's log-probability of each response"),
        ("teacher_reference", "the teacher's own DPO margin"),
        ("reference", "the student's DPO margin: the student's start"),
        ("student", "the student's DPO margin: the trained student"),
    ):
        if not has(signals, Need(role, "logps")):
            missing.append({"what": what, "command": command(role, "logps")})
    return missing


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
