"""A teacher with other tokens: what its distributions lose in the student's, and what a student learns from them.

    python -m benchmarks.other_tokens --teacher gemma3-270m --student smollm2-135m --data pairs.jsonl --rows 16
    python -m benchmarks.other_tokens --seeds 5

The first compares the projection of two models with the naive pairing of tokens by their names. The second trains small
students on 96 sentences of an artificial language: with SFT, with a teacher of their own tokens and with one of others.
"""

import argparse
import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import quiet

quiet()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, PrinterCallback  # noqa: E402

from prefdistill import METHODS, LiveTeacher  # noqa: E402
from prefdistill.data.load import load_pairs  # noqa: E402
from prefdistill.data.spans import response_text  # noqa: E402
from prefdistill.models.load import load_tokenizer  # noqa: E402
from prefdistill.models.logprobs import likeliest  # noqa: E402
from prefdistill.models.scratch import random_model, train_tokenizer  # noqa: E402
from prefdistill.models.token_map import first_tokens  # noqa: E402
from prefdistill.training.factory import make_trainer  # noqa: E402
from prefdistill.training.options import Training  # noqa: E402

K, CHARACTERS = 50, 1_200
WORDS = [
    "the", "small", "teacher", "reads", "a", "long", "prompt", "and", "answers", "with", "care", "while", "every",
    "student", "copies", "what", "it", "says", "whenever", "another", "paper", "arrives", "late", "tonight",
]  # fmt: skip
CHANCES = (0.55, 0.25, 0.15, 0.05)  # of the four words that may follow a word
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def losses(teacher_name: str, student_name: str, data: str, rows: int) -> dict[str, float]:
    """Return shares of states, and of the teacher's mass at taught states, over plain texts of some pairs."""
    teacher, student = load_tokenizer(teacher_name), load_tokenizer(student_name)
    model = AutoModelForCausalLM.from_pretrained(teacher_name, dtype=torch.float32).eval()
    tokens, names = first_tokens(teacher, student), student.get_vocab()
    same_name = np.zeros(len(tokens.ids), dtype=bool)
    for name, token in teacher.get_vocab().items():
        same_name[token] = name in names
    sums: dict[str, float] = dict.fromkeys(("states", "shared", "taught"), 0)
    sums |= dict.fromkeys(("exact", "start", "unmapped", "rest", "same name", "next taught", "next untaught"), 0.0)
    for row in load_pairs(data).select(range(rows)):
        prompt = "\n".join(message["content"] for message in row["prompt"]) + "\n"
        for side in ("chosen", "rejected"):
            text = prompt + (response_text(row[side]) or "")[:CHARACTERS]
            ends, ids = {}, {}
            for name, tokenizer in (("teacher", teacher), ("student", student)):
                encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=name == "teacher")
                ids[name], ends[name] = encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]
            inside = {name: [len(prompt) <= end < len(text) for end in part] for name, part in ends.items()}
            places = {n: {end: i for i, end in enumerate(part) if inside[n][i]} for n, part in ends.items()}
            shared = [(i, places["teacher"][end]) for end, i in places["student"].items() if end in places["teacher"]]
            taught = np.array([ends["student"][i + 1] <= ends["teacher"][j + 1] for i, j in shared])
            same = np.array([tokens.ids[ids["teacher"][j + 1]] == ids["student"][i + 1] for i, j in shared])
            with torch.no_grad():
                logits = model(torch.tensor([ids["teacher"]])).logits[0, [j for _, j in shared]]
            top, logps, rest = (x.numpy() for x in likeliest(logits[torch.from_numpy(taught)].float(), K))
            mass, mapped = np.exp(logps), tokens.ids[top] >= 0
            counted = {
                "states": sum(inside["student"]),
                "shared": len(shared),
                "taught": taught.sum(),
                "exact": mass[tokens.exact[top]].sum(),
                "start": mass[mapped & ~tokens.exact[top]].sum(),
                "unmapped": mass[~mapped].sum(),
                "rest": np.exp(rest).sum(),
                "same name": mass[same_name[top]].sum(),
                "next taught": same[taught].sum(),
                "next untaught": same[~taught].sum(),
            }
            sums = {name: total + float(counted[name]) for name, total in sums.items()}
    untaught = sums["shared"] - sums["taught"]
    print(f"{sums['states']:.0f} states, {sums['taught']:.0f} taught, {untaught:.0f} shared but not taught")
    shares = {name: sums[name] / sums["states"] for name in ("shared", "taught")}
    shares |= {name: sums[name] / sums["taught"] for name in sums if name not in ("states", *shares, "next untaught")}
    return shares | {"next untaught": sums["next untaught"] / max(untaught, 1)}


def learning(seeds: int) -> dict[str, list[float]]:
    """Return the negative log-probability of held-out text, in nats per character, of a student of each seed."""
    corpus = [_sentence(random.Random(1_000 + i)) for i in range(200)]
    with tempfile.TemporaryDirectory() as root:
        tokenizers: dict[str, Any] = {
            "other": train_tokenizer(corpus, 400),
            "own": train_tokenizer([text[1::2] for text in corpus], 300),
        }
        teachers = {
            name: _train("sft", {}, random_model(one, SHAPE, 7), _pairs(5, 3_000), one, (), 700, 0, root)
            for name, one in tokenizers.items()
        }
        costs: dict[str, list[float]] = {f"teacher, {name} tokens": [] for name in teachers}
        for name, teacher in teachers.items():
            costs[f"teacher, {name} tokens"].append(_cost(teacher, tokenizers[name]))
        for seed in range(seeds):
            data, own = _pairs(200 + seed, 96), tokenizers["own"]
            for name, options, of in (
                ("sft", {"alpha": 0.0}, "own"),
                ("vanillakd, own tokens", {}, "own"),
                ("vanillakd, other tokens", {"across": "first_token"}, "other"),
            ):
                live = LiveTeacher(teachers[of], tokenizer=tokenizers[of], k=K)
                start = random_model(own, SHAPE, seed)
                student = _train("vanillakd", options, start, data, own, (live,), 200, seed, root)
                costs.setdefault(name, []).append(_cost(student, own))
    return costs


def _sentence(draw: random.Random) -> str:
    language = random.Random(0)
    following = {word: language.sample(WORDS, len(CHANCES)) for word in WORDS}
    words = [draw.choice(WORDS)]
    for _ in range(11):
        words += draw.choices(following[words[-1]], CHANCES)
    return " ".join(words)


def _pairs(seed: int, n: int) -> Dataset:
    draw = random.Random(seed)

    def message(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    return Dataset.from_list(
        [
            {
                "prompt": message("user", "go"),
                **{s: message("assistant", _sentence(draw)) for s in ("chosen", "rejected")},
            }
            for _ in range(n)
        ]
    )


def _train(
    name: str, options: dict[str, Any], model: Any, data: Dataset, tokenizer: Any, signals: Sequence[Any], steps: int,
    seed: int, root: str,
) -> Any:  # fmt: skip
    training = Training(batch_size=16, micro_batch_size=16, max_steps=steps, learning_rate=3e-3, save_steps=10**6)
    out = Path(tempfile.mkdtemp(dir=root))
    trainer = make_trainer(
        METHODS[name](**options), lambda: model, data, tokenizer, training, out, signals=signals, seed=seed
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model.eval()  # type: ignore[union-attr]


def _cost(model: Any, tokenizer: Any) -> float:
    test = _pairs(99, 150)
    store = LiveTeacher(model, "student", ("logps",), dataset=test, tokenizer=tokenizer, responses=("chosen",)).bind()
    characters = sum(len(response[0]["content"]) for response in test["chosen"])
    return -float(store.scalar("chosen_logps", store.rows).sum()) / characters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher")
    parser.add_argument("--student")
    parser.add_argument("--data")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=0)
    options = parser.parse_args()
    if options.teacher:
        for name, share in losses(options.teacher, options.student, options.data, options.rows).items():
            print(f"{name:16} {share:.4f}")
    for name, costs in (learning(options.seeds) if options.seeds else {}).items():
        error = f" ± {statistics.stdev(costs) / len(costs) ** 0.5:.4f}" if len(costs) > 1 else ""
        print(f"{name:26} {statistics.fmean(costs):.4f}{error}")


if __name__ == "__main__":
    main()
