"""`prefdistill evaluate`: one model, and whatever is asked for of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefdistill.core.artifact import made_of
from prefdistill.core.progress import say
from prefdistill.data.columns import SIDES
from prefdistill.data.encode import drop_refused
from prefdistill.data.load import check_pairs, load_pairs, load_prompts
from prefdistill.data.truncation import Truncation
from prefdistill.evaluation.benchmarks import known_names, run_benchmarks
from prefdistill.evaluation.generations import (
    RESPONSE,
    Generations,
    by_prompt,
    measure_scores,
    measure_texts,
    references_of,
    unique_prompts,
)
from prefdistill.evaluation.measure import BY_LENGTH, Measured, by_length, mean_of, points
from prefdistill.evaluation.options import EvaluateRequest
from prefdistill.evaluation.pairs import evaluate_pairs, signals_for
from prefdistill.evaluation.reward_model import RewardModel, check_judged, judge_of
from prefdistill.models.load import check_reward_model, load_model, load_tokenizer, ready
from prefdistill.sampling.files import sample_responses
from prefdistill.signals import Signals

if TYPE_CHECKING:
    from datasets import Dataset


def evaluate(request: EvaluateRequest, out: Path) -> dict[str, Any]:
    """Everything that is asked for; responses are sampled once, into a file beside `out`.

    Returns:
        `{"metrics": {name: estimate}}` and, as asked, `margin_accuracy`, `pairs`, `generations`, `by_length`, `judge`,
        `against`, `benchmarks`; see docs/evaluate.md.

    Raises:
        UserError: if data, models and stores do not fit together.
    """
    results: dict[str, Any] = {"model": request.model, "data": request.data, "metrics": {}}
    if request.lm_eval:
        known_names(request.lm_eval, request.lm_eval_include)
    if request.reward_model is not None:
        check_reward_model(request.reward_model, trust_remote_code=request.trust_remote_code)
    # opened and looked at before the responses are sampled, which takes long
    stores = [Signals.open(path) for path in (request.reference, request.teacher) if path]
    data = None
    if request.data:
        data = load_pairs(request.data) if request.reference else load_prompts(request.data)
        if set(SIDES) <= set(data.column_names):
            check_pairs(data, request.data)
    tokenizer = None
    if request.reference or request.lm_eval:
        tokenizer = load_tokenizer(str(request.model), trust_remote_code=request.trust_remote_code)
        if request.reference:
            assert data is not None
            signals_for(data, tokenizer, stores)
    if request.answers:
        results |= _evaluate_answers(request, data, out)
    if tokenizer is None:
        return results
    model = ready(load_model(str(request.model), dtype=request.dtype, trust_remote_code=request.trust_remote_code))
    if request.reference:
        assert data is not None
        found = evaluate_pairs(model, data, tokenizer, stores)
        results |= found | {"metrics": found["metrics"] | results["metrics"]}
    if request.lm_eval:
        results["benchmarks"] = run_benchmarks(
            model,
            tokenizer,
            request.lm_eval,
            include=request.lm_eval_include,
            limit=request.limit,
            batch_size=request.lm_eval_batch_size,
            seed=request.seed,
        )
    return results


def _evaluate_answers(request: EvaluateRequest, data: "Dataset | None", out: Path) -> dict[str, Any]:
    """Responses, sampled or given: their lengths, how near they are to the references, and what the judge says."""
    given, trust = request.generations, request.trust_remote_code
    rows = load_prompts(str(given)) if given else data
    assert rows is not None
    if request.reward_model:
        check_judged(
            request.reward_model,
            rows,
            str(given or request.data),
            None if given else load_tokenizer(str(request.model), trust_remote_code=trust),
            limit=request.prompts,
            trust_remote_code=trust,
        )
    file = given or out.with_name(f"{out.stem}.generations.jsonl")
    if not given:
        rows = _sample(request, unique_prompts(rows, request.prompts), file)
    column = request.column if request.generations else RESPONSE
    ours = Generations.read(rows, column, references_of(data) if data is not None else None)
    measured = Measured()
    measure_texts(measured, ours)
    told: dict[str, Any] = {}
    if request.reward_model:
        told = _judge(request, measured, ours, data)
    made = made_of(file)
    shown = {key: made[key] for key in ("ended_share", "tokens_per_second") if key in made}
    edges = request.length_ranges or None
    return {
        "metrics": {metric: mean_of([[measured]], metric) for metric in BY_LENGTH if metric in measured.metrics},
        "by_length": by_length({"model": [[measured]]}, edges),
        "generations": {"file": str(file), "responses": len(ours.responses), **shown, "points": points(measured)},
        **told,
    }


def _sample(request: EvaluateRequest, prompts: "Dataset", file: Path) -> "Dataset":
    return sample_responses(
        str(request.model),
        prompts.select_columns("prompt"),
        out=file,
        column=RESPONSE,
        temperature=request.temperature,
        max_new_tokens=request.max_new_tokens,
        truncation=Truncation(None),
        batch_size=request.batch_size,
        seed=request.seed,
        engine=request.engine,
        learnt_from=False,
        dtype=request.dtype,
        trust_remote_code=request.trust_remote_code,
    )


def _judge(request: EvaluateRequest, measured: Measured, ours: Generations, data: "Dataset | None") -> dict[str, Any]:
    """Scores of the judge, the win rate, and what the judge is worth on the data's own pairs."""
    judge = RewardModel(str(request.reward_model), trust_remote_code=request.trust_remote_code)
    told: dict[str, Any] = {}
    others = None
    if data is not None and set(SIDES) <= set(data.column_names):
        pairs = drop_refused(data, judge.tokenizer, "judge")
        worth = judge.judge_pairs(pairs)
        told["judge"] = judge_of(str(request.reward_model), [worth])
        others = by_prompt(pairs["prompt"][:], worth.items["chosen_score"])
        told["against"] = f"the chosen responses of {request.data}"
    if request.against:
        theirs = Generations.read(load_prompts(str(request.against)), request.column)
        others = by_prompt(theirs.prompts, judge.score(theirs.prompts, theirs.responses, what="judging the others"))
        told["against"] = str(request.against)
    if others is None:
        say("evaluate: no win rate, for there is nothing to compare with: --against, or data with chosen responses")
    measure_scores(measured, ours, judge, others)
    return told


def as_text(results: dict[str, Any]) -> str:
    """The results line by line, for a person."""
    lines = [_line(name, value) for name, value in results["metrics"].items()]
    if against := results.get("against"):
        lines.append(f"  win rate against {against}")
    lines += [_line(name, value) for name, value in results.get("margin_accuracy", {}).items()]
    if "pairs" in results:
        lines.append(f"  accuracies of {results['pairs']} pairs")
    if judge := results.get("judge"):
        lines.append(_line("the judge on these pairs", judge["accuracy"]))
        lines.append(_line("longer is better, likewise", judge["longer_is_better"]))
    for name, task in results.get("benchmarks", {}).get("tasks", {}).items():
        for metric, value in task["metrics"].items():
            error = "" if value["se"] is None else f" ± {value['se']:.3f}"
            lines.append(f"{name + ', ' + metric:28} {value['mean']:.3f}{error}   (n = {task['n']})")
    if made := results.get("generations"):
        lines.append(f"responses  {made['file']}")
    return "\n".join(lines)


def _line(name: str, value: dict[str, Any]) -> str:
    error = "" if value["se"] is None else f" ± {value['se']:.3f}, 95 % {value['low']:.3f} to {value['high']:.3f}"
    return f"{name:28} {value['mean']:.3f}{error}   ({value['n']} prompts)"
