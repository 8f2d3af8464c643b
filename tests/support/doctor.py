"""Pairs, tokenizers, models and recipes for tests of the doctor."""

import json

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from prefdistill.data.truncation import Truncation
from prefdistill.experiment.recipe import load_recipe
from support.pairs import conversation
from support.tokenizer_styles import make_tokenizer

SUBJECTS = [
    "Paris", "Rome", "trains", "rivers", "bread", "music", "letters", "stars", "winter", "gardens", "clocks", "ink",
]  # fmt: skip
LONG = Truncation(None)
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def clean(first=0):
    """Return twelve pairs without faults; in half of them the chosen response is the longer one."""
    rows = []
    for i, subject in enumerate(SUBJECTS, first):
        short, long = f"Short words on {subject}.", f"Rather more words that are about {subject} and nothing else."
        responses = (short, long) if i % 2 else (long, short)
        row = conversation(f"Question {i}: what of {subject}?", *responses)
        rows.append(row | {"score_chosen": 2.0, "score_rejected": 1.0})
    return rows


def plain(rows):
    return [{name: text_of(row[name]) for name in ("prompt", "chosen", "rejected")} for row in rows]


def text_of(messages):
    return messages[-1]["content"]


def write(path, rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def model_of(tokenizer, path, **shape):
    tokenizer.save_pretrained(path)
    AutoModelForCausalLM.from_config(config_of(tokenizer, **shape)).save_pretrained(path)
    return str(path)


def config_of(tokenizer, **shape):
    return LlamaConfig(**{**SMALL, "vocab_size": len(tokenizer), **shape}, architectures=["LlamaForCausalLM"])


def checks_found(checkup, *severities):
    return {f.check for f in checkup.findings if f.severity in (severities or ("error", "warning"))}


def finding_of(checkup, check):
    (finding,) = [f for f in checkup.findings if f.check == check]
    return finding


def edited(changes):
    """Return the clean rows with changes {row: {column: value}}; text becomes a message of the right role."""
    rows = clean()
    for row, columns in changes.items():
        for name, value in columns.items():
            role = "user" if name == "prompt" else "assistant"
            is_text = isinstance(value, str) and not name.startswith("score")
            rows[row][name] = [{"role": role, "content": value}] if is_text else value
    return rows


def scored(*values):
    """Return the first clean rows with these scores of the chosen responses and 0 of the rejected ones."""
    pairs = zip(clean(), values, strict=False)
    return [{**row, "score_chosen": value, "score_rejected": 0.0} for row, value in pairs]


def turns(*said):
    return [{"role": role, "content": f"{role} says {i}"} for i, role in enumerate(said)]


HEADER = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
TAIL = "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
GENERATE = "{% if add_generation_prompt %}<|assistant|>{% endif %}"


def templated(template):
    """Return a function that sets another chat template on a tokenizer."""

    def change(tokenizer):
        tokenizer.chat_template = template
        return tokenizer

    return change


def tokenizer_of_style(name, **options):
    return lambda _: make_tokenizer(name, **options)


def word_tokenizer(_):
    """Return a word-level tokenizer of a few words."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", "Question", "what", "of", "Short", "words"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


SYSTEM = edited({i: {"prompt": [*turns("system"), *clean()[i]["prompt"]]} for i in range(12)})


def copy_of(tokenizer, tmp_path, **changes):
    tokenizer.save_pretrained(tmp_path / "copy")
    copy = PreTrainedTokenizerFast.from_pretrained(tmp_path / "copy")
    for name, value in changes.items():
        setattr(copy, name, value)
    return copy


def more_tokens(tokenizer):
    tokenizer.add_tokens(["<|tool|>"])
    return tokenizer


def other_pieces(tokenizer, at="e"):
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(at, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def with_eos(tokenizer):
    tokenizer.eos_token = "<|bos|>"
    return tokenizer


RECIPE = """
name: planned
data: {{train: {train}, test: {test}, max_length: 200}}
model: {{teacher: {model}, student: {model}}}
teacher: {{dpo: {{beta: 0.1}}}}
methods:
  dpo: {{}}
  tvkd: {{alpha: 0.1}}
  dckd: {{}}
  wpo: {{}}
  seqkd: {{}}
  tvkd-lora: {{method: tvkd, alpha: 0.1, training: {{lora: {{r: 2}}}}}}
"""


def recipe_for(tmp_path, tokenizer, *overrides, rows=None):
    model = model_of(tokenizer, tmp_path / "model")
    train = write(tmp_path / "train.jsonl", rows or clean())
    test = write(tmp_path / "test.jsonl", clean(first=100))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(train=train, test=test, model=model))
    return load_recipe(tmp_path / "recipe.yaml", overrides)


FROM_SCRATCH = f"model={{scratch: {{vocab_size: 300, teacher: {json.dumps(SMALL)}, student: {json.dumps(SMALL)}}}}}"
