"""Pairs of random words with the lengths of real ones, a tokenizer of any size for them, and signals."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Median and 95th percentile of the lengths, in words and marks, of 4,360 preference pairs from AlpacaEval's results
# (tatsu-lab/alpaca_eval), and the correlation of the logarithms of the two responses'. A lognormal through both
# percentiles has means of 41, 267 and 143; those of the pairs are 38, 261 and 142.
LENGTHS = {"prompt": (22, 138), "chosen": (240, 511), "rejected": (110, 364)}
CORRELATION = 0.44
SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>")
COLUMNS = ("prompt", "chosen", "rejected", "student_response")


def make_tokenizer(vocab_size: int) -> "PreTrainedTokenizerBase":
    """Return a tokenizer with one token per word w0, w1, ...: exact token counts with a vocabulary of any size."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from prefdistill.models.scratch import CHAT_TEMPLATE

    words = (*SPECIAL, *(f"w{i}" for i in range(vocab_size - len(SPECIAL))))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        extra_special_tokens=list(SPECIAL[3:]),
        chat_template=CHAT_TEMPLATE,
    )


def fitted_lengths(pairs: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the words of each of `COLUMNS`, [pairs, 4]; the student's responses are as long as rejected ones."""
    z = rng.standard_normal((pairs, 4))
    z[:, 2] = CORRELATION * z[:, 1] + np.sqrt(1 - CORRELATION**2) * z[:, 2]
    bounds = np.array([LENGTHS[name] for name in ("prompt", "chosen", "rejected", "rejected")])
    centre, spread = np.log(bounds[:, 0]), np.log(bounds[:, 1] / bounds[:, 0]) / 1.645
    return np.exp(centre + spread * z).round().astype(int).clip(min=1)


def real_lengths(source: Path, pairs: int, rng: np.random.Generator) -> np.ndarray:
    """Return the lengths of random rows of a .jsonl(.gz) file of conversations, [pairs, 4]."""
    from prefdistill.data.load import load_pairs

    counts = [
        [sum(len(re.findall(r"\w+|[^\w\s]", message["content"])) for message in row[name]) for name in COLUMNS[:3]]
        for row in load_pairs(str(source))
    ]
    drawn = rng.choice(np.array(counts), pairs, replace=len(counts) < pairs)
    return np.concatenate([drawn, rng.permutation(drawn[:, 2:])], axis=1).clip(min=1)


def make_pairs(pairs: int, vocab_size: int, *, source: str | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Return conversations of random words, with the lengths of the real pairs in `source` if given."""
    rng = np.random.default_rng(seed)
    lengths = real_lengths(Path(source), pairs, rng) if source else fitted_lengths(pairs, rng)

    def message(role: str, words: int) -> list[dict[str, str]]:
        drawn = rng.integers(vocab_size - len(SPECIAL), size=words)
        return [{"role": role, "content": " ".join(f"w{i}" for i in drawn)}]

    roles = ("user", "assistant", "assistant", "assistant")
    return [
        {name: message(role, words) for name, role, words in zip(COLUMNS, roles, row, strict=True)} for row in lengths
    ]


def make(
    directory: str,
    shape: dict[str, Any],
    teacher: dict[str, Any],
    pairs: int,
    source: str | None,
    max_length: int,
    k: int,
    bf16: bool,
    signals: list[str],
    dense: list[str],
) -> tuple[None, dict[str, Any]]:
    """Write pairs and the named signals of random models for other processes, and return how long they took.

    `reference` is the log-probs of the student's start, `teacher` values and top-k of the teacher, `own` top-k of the
    teacher and its reference on the student's responses. `dense` names responses whose full distributions are written.
    """
    from benchmarks import harness
    from benchmarks.shapes import make_model
    from prefdistill import extract_signals
    from prefdistill.core.files import write_jsonl
    from prefdistill.data.truncation import Truncation

    where = Path(directory)
    write_jsonl(where / "pairs.jsonl", make_pairs(pairs, shape["vocab_size"], source=source))
    tokenizer, data = make_tokenizer(shape["vocab_size"]), load(directory)
    common = {"truncation": Truncation(max_length), "dtype": "float32"}
    facts = {}
    if "reference" in signals:
        model = make_model(shape, tokenizer, 0)
        start = harness.clock()
        extract_signals(model, data, tokenizer, ("logps",), where / "reference", role="reference", bf16=bf16, **common)
        facts["reference_seconds"] = harness.clock() - start
    models = {
        role: make_model(teacher, tokenizer, seed) for seed, role in enumerate(("teacher", "teacher_reference"), 1)
    }
    if "teacher" in signals:
        extract_signals(models["teacher"], data, tokenizer, ("values", "topk"), where / "teacher", k=k, **common)
    if "own" in signals:
        own = {"kinds": ("topk",), "responses": ("student_response",), **common}
        teacher_store = extract_signals(models["teacher"], data, tokenizer, out=where / "own", k=k, **own)
        extract_signals(
            models["teacher_reference"], data, tokenizer, out=where / "own_reference", role="teacher_reference",
            ids_from=teacher_store, **own,
        )  # fmt: skip
    if dense:
        from benchmarks.dense import write_distributions

        responses_of = {"teacher": dense, "teacher_reference": [name for name in dense if name == "student_response"]}
        facts["dense_bytes"] = sum(
            write_distributions(models[role], data, tokenizer, Truncation(max_length), where / role, responses)
            for role, responses in responses_of.items()
        )
    return None, facts


def load(directory: str) -> "Dataset":
    from prefdistill.data.load import load_pairs

    return load_pairs(str(Path(directory) / "pairs.jsonl"), responses=("chosen", "rejected", "student_response"))
