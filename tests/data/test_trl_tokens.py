"""Over random templates, rows and file formats: the tokens of pairs are those of TRL's own DPO tokenization.

docs/data.md lists the differences; each is asserted here where it is allowed.
"""

import copy
import csv
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

from datasets import Dataset, Features, Json, List, Value
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from pyarrow.lib import ArrowInvalid, ArrowNotImplementedError, ArrowTypeError
from trl import DPOTrainer

from prefdistill.data.encode import encode_pairs
from prefdistill.data.encoder import Encoder
from prefdistill.data.load import load_pairs
from prefdistill.data.truncation import Truncation
from support.pairs import assistant, user, write_jsonl
from support.tokenizer_styles import make_tokenizer

STARTS = ("", "{{ bos_token }}", "{% if strftime_now is defined %}{{ strftime_now('%Y-%m') }}\n{% endif %}")
TOOLS = (
    "",
    "{% for d in documents or [] %}({{ d.text }}){% endfor %}",
    "{% if tools %}<|system|>{{ tools | tojson }}{% endif %}",
    "{% for t in tools or [] %}{{ t.name }}{% endfor %}",
)
SYSTEM = (
    "",
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}",
    "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}",
)
CALLS = "{% for c in m.tool_calls or [] %}[{{ c.function | tojson }}]{% endfor %}"
CONTENT = (
    "{{ m.content }}" + CALLS,
    "{% if m.thinking %}<t>{{ m.thinking }}</t>{% endif %}{{ m.content }}" + CALLS,
    "{{ m.content | trim }}" + CALLS,
    "{{ m.content }}",
    "{{ m.content.split('</t>')[-1] if not loop.last else m.content }}",
)
ENDS = ("{{ eos_token }}", "{{ eos_token }}\n", "", "\n")
OPENINGS = ("", "", "{% if think is defined %}{{ '<t>' if think else '<t></t>' }}{% endif %}", "<t>")


@st.composite
def templates(draw):
    start, tools, system, content, end, opening = (
        draw(st.sampled_from(parts)) for parts in (STARTS, TOOLS, SYSTEM, CONTENT, ENDS, OPENINGS)
    )
    header = draw(st.sampled_from(("<|{}|>", "[{}]", "{}:\n")))
    turn = header.format("{{ m.role }}") + content
    return (
        f"{start}{tools}{system}{{% for m in messages %}}{turn}{{% if m.role == 'assistant' %}}{end}{{% endif %}}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{header.format('assistant')}{opening}{{% endif %}}"
    )


TEXTS = st.one_of(
    st.sampled_from(
        ["yes", " no", "so it is", "The answer\n\nis 3. ", "<t>hm</t>yes", "", "null", "ümläut 中文 🙂", '{"a": 1}']
    ),
    st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12),
)


def objects(**values):
    """Objects with the first of these keys: Arrow has one order of keys, and one type of number, for a whole column."""

    def first(count):
        return st.tuples(*list(values.values())[:count]).map(lambda drawn: dict(zip(values, drawn, strict=False)))

    return st.integers(0, len(values)).flatmap(first)


NUMBERS = st.integers(0, 3)
ARGUMENTS = objects(a=NUMBERS, b=NUMBERS, c=objects(d=st.sampled_from(["x", "y"])))
SCHEMAS = st.tuples(
    st.sampled_from(["add", "find"]), objects(parameters=objects(x=NUMBERS, city=objects(type=TEXTS)))
).map(lambda schema: {"name": schema[0], **schema[1]})


@st.composite
def rows(draw):
    """One form for all rows; what rows may have beside it differs from row to row."""
    count = draw(st.integers(2, 3))
    if draw(st.integers(0, 4)) == 0:
        return [{name: draw(TEXTS) + "." for name in ("prompt", "chosen", "rejected")} for _ in range(count)]
    conversational = [draw(conversations()) for _ in range(count)]
    if draw(st.booleans()):
        return [row | {"tools": json.dumps(row["tools"])} if "tools" in row else row for row in conversational]
    return conversational


@st.composite
def conversations(draw):
    prompt = [user(draw(TEXTS))]
    if draw(st.booleans()):
        call = {"function": {"name": "add", "arguments": draw(ARGUMENTS)}}
        prompt += [{**assistant(""), "tool_calls": [call]}, {"role": "tool", "content": draw(TEXTS)}]
    if draw(st.booleans()):
        prompt.insert(0, {"role": "system", "content": draw(TEXTS)})
    sides = {name: [assistant(draw(TEXTS))] for name in ("chosen", "rejected")}
    if draw(st.booleans()):
        sides["chosen"][0]["thinking"] = draw(TEXTS) or "hm"
    row = {"prompt": prompt, **sides}
    if draw(st.booleans()):
        row["tools"] = draw(st.lists(SCHEMAS, max_size=2))
    if draw(st.booleans()):
        row["chat_template_kwargs"] = draw(
            st.sampled_from([{}, {"think": True}, {"think": False}, {"documents": [{"text": "x"}]}])
        )
    return row


def write(kind, directory, rows):
    """Write rows in a format, and return the name to load them by."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = {name: [row.get(name) for row in rows] for name in names}
    if kind == "jsonl":
        return write_jsonl(directory / "rows.jsonl", rows)
    if kind == "csv":
        with (directory / "rows.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            for row in rows:
                values = {name: v if isinstance(v, str) else json.dumps(v) for name, v in row.items()}
                writer.writerow(dict.fromkeys(names, "") | values)
        return str(directory / "rows.csv")
    path = directory / {"saved": "saved", "parquet": "rows.parquet"}.get(kind, "data/train-00000-of-00001.parquet")
    path.parent.mkdir(exist_ok=True)
    for options in ({}, {"on_mixed_types": "use_json"}):
        try:  # structures with the keys of all rows, null where a row has none
            dataset = Dataset.from_dict(table, **options)
            dataset.save_to_disk(path) if kind == "saved" else dataset.to_parquet(path)
            break
        except (ArrowInvalid, ArrowTypeError, ArrowNotImplementedError):
            path.unlink(missing_ok=True)
    return str(directory if kind == "directory" else path)


def tokens_of_trl(row, tokenizer):
    """Return the token ids that TRL's DPO trains on; None where it cannot render the row."""
    types = {name: List(Json()) for name in ("prompt", "chosen", "rejected", "tools")} | {
        "chat_template_kwargs": Json()
    }
    types = {name: types[name] if not isinstance(value, str) else Value("string") for name, value in row.items()}
    dataset = Dataset.from_list([row], features=Features(types))
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    try:
        encoded = DPOTrainer._prepare_dataset(trainer, dataset, tokenizer, arguments, "train")[0]
    except TemplateError:
        return None
    return {name: encoded[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")}


@given(rows=rows(), template=templates(), kind=st.sampled_from(["parquet", "jsonl", "saved", "csv", "directory"]))
@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking takes minutes, and rows are small as they are
)
def test_tokens_are_those_of_trl(rows, template, kind):
    tokenizer = copy.deepcopy(make_tokenizer("llama3"))  # the original is shared by tests
    tokenizer.chat_template = template
    with tempfile.TemporaryDirectory() as directory:
        pairs = load_pairs(write(kind, Path(directory), rows))
        encoded, _ = encode_pairs(pairs, tokenizer, Truncation(None), rows=range(len(rows)))
    ending, own_rows = Encoder(tokenizer).ending, {row["row"]: row for row in encoded}
    for number, row in enumerate(rows):
        # An empty list of tools is none; to TRL a row has no null.
        trl_tokens = tokens_of_trl({name: value for name, value in row.items() if value not in ([], "[]")}, tokenizer)
        if trl_tokens is None:
            event("refused by the template")
            assert number not in own_rows
            continue
        prompt, sides = whole_prompt(row, tokenizer), [trl_tokens[side] for side in ("chosen", "rejected")]
        if trl_tokens["prompt"] != prompt or not all(sides):
            event("TRL cuts the prompt, or a response has no tokens")
            assert number not in own_rows
            continue
        own = own_rows[number]
        event(kind)
        assert own["prompt_ids"] == prompt
        for side, ids in zip(("chosen", "rejected"), sides, strict=True):
            own_ids = own[f"{side}_ids"]
            assert own_ids == ids[: len(own_ids)]
            after = tokenizer.decode(ids[len(own_ids) :], clean_up_tokenization_spaces=False)
            assert after == (ending.after if own[f"{side}_ended"] and isinstance(row["prompt"], list) else "")


def whole_prompt(row, tokenizer):
    """Return the tokens of the prompt, whatever follows it."""
    if isinstance(row["prompt"], str):
        return tokenizer(row["prompt"])["input_ids"]
    tools, variables = row.get("tools"), row.get("chat_template_kwargs", {})
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return tokenizer.apply_chat_template(
        row["prompt"], tools=tools or None, add_generation_prompt=True, return_dict=True, **variables
    )["input_ids"]
