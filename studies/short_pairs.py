"""Split preference pairs by prompt into files for a judge, for training and for testing; leave out long pairs.

    python studies/short_pairs.py DIR PAIRS.jsonl.gz ... --tokenizer NAME --max-tokens 288

DIR gets judge.jsonl, train.jsonl and test.jsonl. Every prompt, with all of its pairs, goes to one of them, by a digest
of its text: a quarter to the judge, a quarter to the test. Pairs of which the prompt with either response takes more
tokens than --max-tokens are left out, so that no response is cut: a cut response has not ended, and a value may see
that. The order of the pairs follows a digest as well, so that the first rows are of many prompts.
"""

import argparse
import hashlib
from pathlib import Path

from prefdistill.core.files import write_jsonl
from prefdistill.data.columns import SIDES
from prefdistill.data.encode import encode_pairs
from prefdistill.data.load import load_pairs
from prefdistill.data.prompts import prompt_text, prompts_of
from prefdistill.data.truncation import Truncation
from prefdistill.models.load import load_tokenizer

FILES = ("judge.jsonl", "test.jsonl", "train.jsonl", "train.jsonl")  # a quarter of the prompts each


def digest(text: str) -> int:
    """Return a number that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("pairs", nargs="+")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--max-tokens", type=int, required=True)
    arguments = parser.parse_args()
    tokenizer, rows = load_tokenizer(arguments.tokenizer), []
    for name in arguments.pairs:
        pairs = load_pairs(name)
        encoded, _ = encode_pairs(pairs, tokenizer, Truncation(None))
        texts, columns = (
            prompts_of(pairs),
            (encoded["row"], encoded["prompt_ids"], *(encoded[f"{s}_ids"] for s in SIDES)),
        )
        for row, prompt, *sides in zip(*columns, strict=True):
            if len(prompt) + max(map(len, sides)) <= arguments.max_tokens:
                rows.append((prompt_text(texts[row]), pairs[row]))
    rows.sort(key=lambda one: digest(repr([one[1][side] for side in SIDES])))
    arguments.out.mkdir(parents=True, exist_ok=True)
    for file in dict.fromkeys(FILES):
        kept = [(text, pair) for text, pair in rows if FILES[digest(text) % len(FILES)] == file]
        write_jsonl(arguments.out / file, [pair for _, pair in kept])
        print(f"{file}: {len(kept)} pairs of {len({text for text, _ in kept})} prompts")


if __name__ == "__main__":
    main()
