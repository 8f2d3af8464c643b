"""Benchmarks of the lm-evaluation-harness (the extra `lm-eval`), run on a model that is loaded already."""

import difflib
import functools
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefdistill.core.errors import UserError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Names of ours for groups of the harness: the Open LLM Leaderboard's first set (ARC, HellaSwag, TruthfulQA, MMLU,
# Winogrande, GSM8K, with its numbers of shots), which the papers report, and its second.
GROUPS = {"open-llm-leaderboard": "openllm", "open-llm-leaderboard-2": "leaderboard"}


@functools.cache
def known_tasks(include: str | None) -> "TaskManager":
    """The harness's tasks and those in a directory of one's own; it reads thousands of files, once."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include)


def known_names(tasks: Sequence[str], include: str | Path | None = None) -> list[str]:
    """The harness's own names of some tasks.

    Raises:
        UserError: if the harness is not installed or does not know a task.
    """
    if find_spec("lm_eval") is None:
        raise UserError('--lm-eval needs the lm-evaluation-harness: pip install "prefdistill[lm-eval]"')
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = known_tasks(None if include is None else str(include))
    asked = [GROUPS.get(task, task) for task in tasks]
    for task in asked:
        if task not in manager.all_tasks and not Path(task).is_file():
            close = difflib.get_close_matches(task, [*GROUPS, *manager.all_tasks], n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "--lm-eval-include names a directory of yours"
            raise UserError(f"the lm-evaluation-harness has no task {task!r}; {hint}")
    return asked


def run_benchmarks(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[str],
    *,
    include: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracies and the like on tasks of the harness, without a chat template, as the leaderboards' first set had it.

    Args:
        model: in eval mode, on its device.
        tokenizer: the model's.
        tasks: names of tasks or groups that the harness knows, or of `GROUPS`, or task files.
        include: a directory with task files of one's own.
        limit: the first items of each task only; for trying out, not for reporting.
        batch_size: requests read together.
        seed: of the examples that are shown, and of sampling.

    Returns:
        `{"tasks": {name: {"version", "shots", "n", "metrics": {name: {"mean", "se"}}}}, "lm_eval": version, "limit"}`;
        `groups` beside it where the harness averages over tasks. "se" is None where the harness gives none.

    Raises:
        UserError: if the harness is not installed or does not know a task.
    """
    asked = known_names(tasks, include)
    from importlib.metadata import version

    import lm_eval
    from lm_eval.models.huggingface import HFLM

    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=asked,
        task_manager=known_tasks(None if include is None else str(include)),
        limit=limit,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    assert found is not None  # only where another process reports
    results = {name: scores for name, scores in found["results"].items() if name in found["n-samples"]}
    told: dict[str, Any] = {
        "tasks": {
            name: {
                "version": found["versions"].get(name),
                "shots": found["n-shot"].get(name),
                "n": found["n-samples"][name]["effective"],
                "metrics": _metrics(scores),
            }
            for name, scores in results.items()
        },
        "lm_eval": version("lm_eval"),
        "limit": limit,
    }
    if groups := {name: {"metrics": _metrics(scores)} for name, scores in found.get("groups", {}).items()}:
        told["groups"] = groups
    return told


def _metrics(scores: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """From the harness's "acc,none" and "acc_stderr,none" to `{"acc": {"mean", "se"}}`; a filter stays in the name."""
    found: dict[str, dict[str, float | None]] = {}
    for key, value in scores.items():
        metric, comma, rule = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = scores.get(f"{metric}_stderr,{rule}")
        name = metric if rule == "none" else f"{metric} ({rule})"
        found[name] = {"mean": float(value), "se": float(error) if isinstance(error, int | float) else None}
    return found
