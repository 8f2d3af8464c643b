"""Make the files of studies/real-models.yaml in DIR: pairs, judge, teacher and the student's start.

    python studies/real_models.py DIR PAIRS.jsonl.gz ... --model HuggingFaceTB/SmolLM2-135M-Instruct

- judge.jsonl, train.jsonl, test.jsonl: every prompt, with all of its pairs, goes to one of them by a digest of its
  text, a quarter to the judge and a quarter to the test. Pairs of which the prompt with either response takes more
  tokens than --max-tokens are left out, so that no response is cut: a cut response has not ended, and a value may see
  that. The order of the pairs follows a digest as well, so that the first rows are of many prompts.
- judge: a reward model trained from the model, the same for every cell and seed (`reward_model.name`).
- teacher: the model after DPO on the training pairs; the model itself is its reference.
- other-teacher: with --other-model, that model after DPO on the first --other-pairs of them, for
  studies/other-family.yaml. Conversations need a chat template in its tokenizer.
- start: some layers of the model, healed by SFT on the chosen responses of the judge's pairs: after SFT on those of the
  training pairs, DPO would learn to tell the responses that the student has seen from those that it has not.

Finished files are reused: after an interruption the same command resumes.
"""

import argparse
import hashlib
from functools import partial
from pathlib import Path
from typing import Any

from prefdistill.cli import main as prefdistill
from prefdistill.core.files import write_jsonl
from prefdistill.core.stages import run_stage
from prefdistill.data.columns import SIDES
from prefdistill.data.encode import encode_pairs
from prefdistill.data.load import load_pairs
from prefdistill.data.prompts import prompt_text, prompts_of
from prefdistill.data.truncation import Truncation
from prefdistill.models.classifiers import new_classifier
from prefdistill.models.load import load_tokenizer
from prefdistill.models.options import FromModel
from prefdistill.models.pruned import save_pruned
from prefdistill.training.options import Training
from prefdistill.training.trl import train_reward

FILES = ("judge.jsonl", "test.jsonl", "train.jsonl", "train.jsonl")  # a quarter of the prompts each
BATCHES = ["training.batch_size=8", "training.micro_batch_size=4", "training.bf16=true"]
LORA = ["training.learning_rate=2e-4", "training.lora={r: 16, alpha: 32}"]


def digest(text: str) -> int:
    """Return a number that depends on the text alone.

    >>> digest("a") % 4
    2
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_pairs(out: Path, names: list[str], model: str, max_tokens: int) -> None:
    """Write the files of pairs."""
    rows: list[tuple[str, dict[str, Any]]] = []
    tokenizer = load_tokenizer(model)
    for name in names:
        pairs = load_pairs(name)
        encoded, _ = encode_pairs(pairs, tokenizer, Truncation(None))
        texts = prompts_of(pairs)
        columns = (encoded[column][:] for column in ("row", "prompt_ids", *(f"{side}_ids" for side in SIDES)))
        for row, prompt, *sides in zip(*columns, strict=True):
            if len(prompt) + max(map(len, sides)) <= max_tokens:
                rows.append((prompt_text(texts[row]), pairs[row]))
    rows.sort(key=lambda one: digest(repr([one[1][side] for side in SIDES])))
    for file in dict.fromkeys(FILES):
        in_file = [(text, pair) for text, pair in rows if FILES[digest(text) % len(FILES)] == file]
        write_jsonl(out / file, [pair for _, pair in in_file])
        print(f"{file}: {len(in_file)} pairs of {len({text for text, _ in in_file})} prompts")


def train_judge(pairs: Path, model: str, out: Path) -> None:
    """Train the reward model."""
    start = FromModel.model_validate({"from": model})
    training = Training(learning_rate=2e-5, epochs=2, batch_size=8, micro_batch_size=4, bf16=True)
    make_model, tokenizer = partial(new_classifier, start), load_tokenizer(model)
    train_reward(make_model, load_pairs(str(pairs)), tokenizer, training, out, what="judge")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("pairs", nargs="+")
    parser.add_argument("--model", required=True)
    parser.add_argument("--max-tokens", type=int, default=288)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--other-model")
    parser.add_argument("--other-pairs", type=int, help="default: all")
    arguments = parser.parse_args()
    out, model = arguments.out, arguments.model
    out.mkdir(parents=True, exist_ok=True)
    split_pairs(out, arguments.pairs, model, arguments.max_tokens)

    def stage(name: str, make: Any, *request: Any) -> None:
        run_stage(name, out / name, {"model": model, "of": list(request)}, make)

    def verb(*words: str) -> None:
        if status := prefdistill(list(words)):
            raise SystemExit(status)

    def train_teacher(name: str, model: str, pairs: str) -> None:
        data, reference = f"--data={out / pairs}", f"{out / name}-reference"
        read = ["--role=reference", "--kind=logps", "--dtype=float32", "--bf16"]
        verb("signals", f"--model={model}", data, *read, f"--out={reference}")
        dpo = ["--method=dpo", f"--signals={reference}", "beta=0.1"]
        verb("distill", f"--student={model}", data, *dpo, f"--out={out / name}", *BATCHES, *LORA)

    stage("judge", lambda place: train_judge(out / "judge.jsonl", model, place), arguments.pairs, arguments.max_tokens)
    train_teacher("teacher", model, "train.jsonl")
    if arguments.other_model:
        rows = (out / "train.jsonl").read_text().splitlines(keepends=True)
        (out / "other-train.jsonl").write_text("".join(rows[: arguments.other_pairs]))
        train_teacher("other-teacher", arguments.other_model, "other-train.jsonl")
    pruned = f"{out / 'pruned'}"
    stage("pruned", lambda place: save_pruned(model, arguments.layers, load_tokenizer(model), place), arguments.layers)
    sft = [f"--data={out / 'judge.jsonl'}", "training.learning_rate=1.5e-4", "training.epochs=1.5"]
    verb("sft", f"--model={pruned}", f"--out={out / 'start'}", *sft, *BATCHES)


if __name__ == "__main__":
    main()
