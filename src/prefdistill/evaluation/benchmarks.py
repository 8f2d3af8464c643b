"""Benchmarks of the lm-evaluation-harness (the extra `lm-eval`), run on a loaded model."""

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

# Aliases of groups of the harness: version 1 of the Open LLM Leaderboard (ARC, HellaSwag, TruthfulQA, MMLU, Winogrande,
# GSM8K, with its numbers of shots), which the papers report, and version 2.
GROUPS = {"open-llm-leaderboard": "openllm", "open-llm-leaderboard-2": "leaderboard"}


@functools.cache
def known_tasks(include: str | None) -> "TaskManager":
    """Return the harness's tasks and those in the directory `include`. Slow: it reads thousands of files; cached."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include)


def known_names(tasks: Sequence[str], include: str | Path | None = None) -> list[str]:
    """Return the harness's names of tasks.

    Raises:
        UserError: if the harness is not installed or does not know a task.
    """
    if find_spec("lm_eval") is None:
        raise UserError('--lm-eval needs the lm-evaluation-harness: pip install "prefdistill[lm-eval]"')
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = known_tasks(None if include is None else str(include))
    names = [GROUPS.get(task, task) for task in tasks]
    for task in names:
        if task not in manager.all_tasks and not Path(task).is_file():
            close = difflib.get_close_matches(task, [*GROUPS, *manager.all_tasks], n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "name your own task files with --lm-eval-include"
            raise UserError(f"the lm-evaluation-harness has no task {task!r}; {hint}")
    return names


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
    """Return the metrics of tasks of the harness, without a chat template, as in version 1 of the leaderboard.

    Args:
        model: in eval mode, on its device.
        tokenizer: the model's.
        tasks: names of tasks or groups that the harness knows, or of `GROUPS`, or task files.
        include: a directory with further task files.
        limit: use only the first items of each task; for trying out, not for reporting.
        batch_size: requests per batch.
        seed: of few-shot examples and of sampling.

    Returns:
        `{"tasks": {name: {"version", "shots", "n", "metrics": {name: {"mean", "se"}}}}, "lm_eval": version, "limit"}`;
        and `groups`, where the harness averages over tasks. "se" is None where the harness has none.

    Raises:
        UserError: if the harness is not installed or does not know a task.
    """
    names = known_names(tasks, include)
    from importlib.metadata import version

    import lm_eval
    from lm_eval.models.huggingface import HFLM

    output = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=names,
        task_manager=known_tasks(None if include is None else str(include)),
        limit=limit,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    assert output is not None  # None only in the other processes of a distributed run
    results = {name: scores for name, scores in output["results"].items() if name in output["n-samples"]}
    report: dict[str, Any] = {
        "tasks": {
            name: {
                "version": output["versions"].get(name),
                "shots": output["n-shot"].get(name),
                "n": output["n-samples"][name]["effective"],
                "metrics": _metrics(scores),
            }
            for name, scores in results.items()
        },
        "lm_eval": version("lm_eval"),
        "limit": limit,
    }
    if groups := {name: {"metrics": _metrics(scores)} for name, scores in output.get("groups", {}).items()}:
        report["groups"] = groups
    return report


def _metrics(scores: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Convert "acc,none" and "acc_stderr,none" to `{"acc": {"mean", "se"}}`; other filters stay in the name."""
    metrics: dict[str, dict[str, float | None]] = {}
    for key, value in scores.items():
        metric, comma, rule = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = scores.get(f"{metric}_stderr,{rule}")
        name = metric if rule == "none" else f"{metric} ({rule})"
        metrics[name] = {"mean": float(value), "se": float(error) if isinstance(error, int | float) else None}
    return metrics
