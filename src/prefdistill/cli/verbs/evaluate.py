"""`prefdistill evaluate`."""

from pathlib import Path
from typing import Any

from pydantic import Field

from prefdistill.cli.output import show
from prefdistill.evaluation.options import EvaluateRequest


class EvaluateFlags(EvaluateRequest):
    out: Path = Field(description="File for the results (JSON).")


def evaluate(options: EvaluateFlags) -> dict[str, Any]:
    """Evaluate a student: held-out pairs, responses, reward model, benchmarks.

    Example: prefdistill evaluate --model models/tvkd --data test.jsonl --reward-model my/reward-model --out e.json
    """
    from prefdistill.core.files import sweep, write_json
    from prefdistill.core.lock import locked
    from prefdistill.core.paths import check_file
    from prefdistill.evaluation import evaluate as evaluation

    out = options.out
    check_file(out, '{\n  "model":', "evaluate")
    with locked(out.parent, f".{out.name}.lock"):
        sweep(out.parent, out.name)
        results = evaluation.evaluate(options, out)
        write_json(out, results)
    show(evaluation.as_text(results))
    return results
