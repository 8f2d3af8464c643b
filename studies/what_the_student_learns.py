"""Split the reward on the built-in task into its parts (matching digits, marks, fillers), relative to the baseline.

    python studies/what_the_student_learns.py runs/studies/alpha/work/alpha=0.3-seed-1 ...

Each argument is a run directory of the quickstart recipe (or one of its `seed-N`). Every student responds to the test
prompts at T=1; the parts of its mean reward and its mean number of words are printed as differences to DPO.
"""

import sys
from pathlib import Path

import numpy as np

from prefdistill.core.files import read_json
from prefdistill.data.synthetic import reward_parts
from prefdistill.models.load import load_model, load_tokenizer, ready
from prefdistill.sampling.sampler import sample

PARTS = ("matches", "opened", "closed", "extras", "unended")


def parts_of(student: Path, prompts: list[str], seed: int) -> np.ndarray:
    """Return the mean of each of PARTS, and of the number of words, over responses to the prompts."""
    model = ready(load_model(str(student), dtype="float32"))
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    responses = sample(
        model,
        load_tokenizer(str(student)),
        conversations,
        max_new_tokens=16,
        batch_size=500,
        seed=seed,
        what=student.name,
    )
    rows = [
        [*(reward_parts(prompt, response.text, response.ended)[part] for part in PARTS), len(response.text.split())]
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    return np.mean(rows, axis=0)


def of_run(run: Path, baseline: str = "dpo") -> dict[str, np.ndarray]:
    """Return each method's difference to the baseline, averaged over data orders."""
    prompts, seed = read_json(run / "data" / "prompts.json")["test"], int(run.name.rsplit("-", 1)[1])
    parts: dict[str, list[np.ndarray]] = {}
    for student in sorted(run.glob("distill-*")):
        name = student.name.removeprefix("distill-").rsplit("-", 1)[0]
        parts.setdefault(name, []).append(parts_of(student, prompts, seed))
    means = {name: np.mean(values, axis=0) for name, values in parts.items()}
    return {name: mean - means[baseline] for name, mean in means.items() if name != baseline}


def main(arguments: list[str]) -> None:
    if not arguments:
        sys.exit(f"usage: python {sys.argv[0]} RUN...")
    header = ("method", *PARTS, "reward", "words")
    print("| run | " + " | ".join(header) + " |\n| :-- | :-- |" + " --: |" * (len(header) - 1))
    for argument in map(Path, arguments):
        seeds = [argument] if (argument / "data").is_dir() else sorted(argument.glob("seed-*"))
        for run in seeds:
            for name, (*parts, words) in of_run(run).items():
                cells = [f"{value:+.3f}" for value in (*parts, sum(parts), words)]
                print(f"| {argument.name} | {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
