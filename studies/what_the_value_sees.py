"""Regress the teacher's shaping margin on the form of responses, on the held-out pairs of the built-in task.

    python studies/what_the_value_sees.py runs/studies/teachers/work/*

Each argument is a run directory of the quickstart recipe (or one of its `seed-N`). The margin
Psi(chosen) - Psi(rejected) is regressed on differences in form, which can be seen without knowing the task: whether a
response opens and closes with its mark, whether it ends in a filler, its number of fillers and its length. R^2 is the
share of the margin's second moment that these explain; also for the closing mark alone and the true reward alone.
"""

import sys
from pathlib import Path

import numpy as np

from prefdistill.data.columns import SIDES
from prefdistill.data.load import load_pairs
from prefdistill.data.synthetic import CLOSE, FILLERS, OPEN
from prefdistill.methods import make_method
from prefdistill.signals import Signals, SignalSet

FORM = ("closed", "opened", "ends in a filler", "fillers", "words")


def form(response: str) -> list[float]:
    """Return the features FORM of a response.

    >>> form("um < 1 2 >")
    [1.0, 0.0, 0.0, 1.0, 5.0]
    """
    words = response.split() or [""]
    fillers = sum(word in FILLERS for word in words)
    features = (words[-1] == CLOSE, words[0] == OPEN, words[-1] in FILLERS, fillers, len(response.split()))
    return [float(value) for value in features]


def explained(margin: np.ndarray, differences: np.ndarray) -> float:
    """Return R^2 of a regression without intercept, because chosen and rejected are exchangeable.

    >>> explained(np.array([2.0, -4.0]), np.array([[1.0], [-2.0]]))
    1.0
    """
    weights = np.linalg.lstsq(differences, margin, rcond=None)[0]
    return float(1 - np.sum((margin - differences @ weights) ** 2) / np.sum(margin**2))


def of_run(run: Path) -> dict[str, float]:
    """Return the R^2 values of one seed's directory."""
    pairs = load_pairs(str(run / "pairs" / "test.jsonl"))
    stores = [Signals.open(run / f"signals-{role}-test" / "store") for role in ("teacher", "reference")]
    signals = SignalSet.of(stores, pairs)
    made_with = {"value_temperature": stores[0].manifest["value_temperature"]}
    returns = make_method("tvkd", {"alpha": 0.0, **made_with}).row_signals(signals)
    margin = returns["shaping_chosen"] - returns["shaping_rejected"]
    rows = pairs.select(signals.rows)
    chosen, rejected = (np.array([form(messages[-1]["content"]) for messages in rows[side]]) for side in SIDES)
    reward = signals.column("score_chosen") - signals.column("score_rejected")
    return {
        "form": explained(margin, chosen - rejected),
        "closing mark alone": explained(margin, (chosen - rejected)[:, :1]),
        "true reward alone": explained(margin, reward[:, None]),
    }


def main(arguments: list[str]) -> None:
    if not arguments:
        sys.exit(f"usage: python {sys.argv[0]} RUN...")
    header = ("form", "closing mark alone", "true reward alone")
    print("| run | " + " | ".join(header) + " |\n| :-- |" + " --: |" * len(header))
    for argument in map(Path, arguments):
        seeds = [argument] if (argument / "pairs").is_dir() else sorted(argument.glob("seed-*"))
        for seed in seeds:
            explained_by = of_run(seed)
            name = seed.parent.name if seed.parent.name.endswith(seed.name) else f"{seed.parent.name}/{seed.name}"
            print(f"| {name} | " + " | ".join(f"{explained_by[column]:.2f}" for column in header) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
