"""`prefdistill evaluate`: metrics of one model on held-out pairs, its responses and benchmarks."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefdistill.core.file_artifact import made_of
from prefdistill.core.progress import say
from prefdistill.data.columns import SIDES, unread_columns
from prefdistill.data.encode import drop_refused
from prefdistill.data.load import check_pairs, load_pairs, load_prompts, say_unread
from prefdistill.data.options import Columns
from prefdistill.data.prompts import prompt_columns, prompts_of
from prefdistill.data.truncation import Truncation
from prefdistill.evaluation.benchmarks import known_names, run_benchmarks
from prefdistill.evaluation.measure import Measured, by_length, mean_of, points
from prefdistill.evaluation.metric_inputs import RESPONSE, Responses
from prefdistill.evaluation.metrics import METRICS
from prefdistill.evaluation.options import EvaluateRequest
from prefdistill.evaluation.pairs import evaluate_pairs, signals_for
from prefdistill.evaluation.responses import REFERENCES, measure_texts, references_of, scores_by_prompt, unique_prompts
from prefdistill.evaluation.reward_model import RewardModel, accuracy_of, check_prompts
from prefdistill.models.load import check_reward_model, load_model, ready
from prefdistill.models.vocabulary import tokenizer_for
from prefdistill.sampling.files import sample_responses
from prefdistill.signals import Signals

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# options that evaluation shares with `sample`
SHARED = {"temperature", "max_new_tokens", "batch_size", "engine", "seed", "dtype", "trust_remote_code"}


def evaluate(request: EvaluateRequest, out: Path) -> dict[str, Any]:
    """Evaluate a model; responses are sampled once, into a file beside `out`.

    Returns:
        `{"metrics": {name: estimate}}` and, as requested, `margin_accuracy`, `pairs`, `responses`, `by_length`,
        `reward_model`, `against`, `benchmarks`; see docs/evaluate.md.

    Raises:
        UserError: if data, models and stores do not fit together.
    """
    place = request.place(request.model) if request.model else None
    results: dict[str, Any] = {"model": place, "data": request.data, "metrics": {}}
    if request.lm_eval:
        known_names(request.lm_eval, request.lm_eval_include)
    if request.reward_model is not None:
        check_reward_model(request.reward_model, trust_remote_code=request.trust_remote_code)
    # checked before responses are sampled, which takes long
    stores = [Signals.open(path) for path in (request.reference, request.teacher) if path]
    data = None
    if request.data:
        load = load_pairs if request.reference else load_prompts
        data = load(request.data, **request.part(Columns))
        if load is load_prompts:
            say_unread(request.data, unread_columns(data.column_names, (*SIDES, *REFERENCES, request.column)))
        if set(SIDES) <= set(data.column_names):
            check_pairs(data, request.data)
    tokenizer = None
    if request.reference or request.lm_eval:
        tokenizer = _tokenizer(request)
        if request.reference:
            assert data is not None
            signals_for(data, tokenizer, stores)
    if request.has_responses:
        results |= _evaluate_responses(request, data, out)
    if tokenizer is None:
        return results
    model = ready(load_model(str(place), dtype=request.dtype, trust_remote_code=request.trust_remote_code))
    if request.reference:
        assert data is not None
        on_pairs = evaluate_pairs(model, data, tokenizer, stores)
        results |= on_pairs | {"metrics": on_pairs["metrics"] | results["metrics"]}
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


def _evaluate_responses(request: EvaluateRequest, data: "Dataset | None", out: Path) -> dict[str, Any]:
    """Return the metrics of responses, sampled or read from a file, and the accuracy of the reward model."""
    rows = load_prompts(str(request.generations)) if request.generations else data
    assert rows is not None
    tokenizer = None if request.generations else _tokenizer(request)
    if request.reward_model:
        check_prompts(
            request.reward_model,
            rows,
            str(request.generations or request.data),
            [tokenizer] if tokenizer else [],
            limit=request.prompts,
            trust_remote_code=request.trust_remote_code,
        )
    file = request.generations or out.with_name(f"{out.stem}.generations.jsonl")
    if not request.generations:
        rows = _sample(request, unique_prompts(rows, request.prompts), tokenizer, file)
    column = request.column if request.generations else RESPONSE
    responses = Responses.read(rows, column, references_of(data) if data is not None else None)
    about: dict[str, Any] = {}
    if request.reward_model:
        responses, about = _score(request, responses, data)
    measured = Measured()
    measure_texts(measured, responses)
    sampling = made_of(file)
    shown = {key: sampling[key] for key in ("ended_share", "tokens_per_second") if key in sampling}
    return {
        "metrics": {name: mean_of([[measured]], name) for name in METRICS if name in measured.metrics},
        "by_length": by_length({"model": [[measured]]}, request.length_ranges or None),
        "responses": {"file": str(file), "responses": len(responses.texts), **shown, "points": points(measured)},
        **about,
    }


def _tokenizer(request: EvaluateRequest) -> "PreTrainedTokenizerBase":
    """Return the tokenizer that the model is read with, in the form of the request."""
    place, trust = request.place(str(request.model)), request.trust_remote_code
    return tokenizer_for(place, request.tokenizer, request.form, trust_remote_code=trust)


def _sample(
    request: EvaluateRequest, prompts: "Dataset", tokenizer: "PreTrainedTokenizerBase | None", file: Path
) -> "Dataset":
    return sample_responses(
        request.place(str(request.model)),
        prompts.select_columns(prompt_columns(prompts.column_names)),
        tokenizer,
        out=file,
        column=RESPONSE,
        truncation=Truncation(None),
        keep_ids=False,
        **request.model_dump(include=SHARED),
    )


def _score(request: EvaluateRequest, responses: Responses, data: "Dataset | None") -> tuple[Responses, dict[str, Any]]:
    """Return the responses with scores and opponents, and the reward model's accuracy on the pairs of the data."""
    reward_model = RewardModel(str(request.reward_model), trust_remote_code=request.trust_remote_code)
    about: dict[str, Any] = {}
    opponents = {}
    if data is not None and set(SIDES) <= set(data.column_names):
        pairs, _ = drop_refused(data, reward_model.tokenizer, "reward model")
        on_pairs = reward_model.score_pairs(pairs)
        about["reward_model"] = accuracy_of(str(request.reward_model), [on_pairs])
        opponents["chosen"] = scores_by_prompt(prompts_of(pairs), on_pairs.items["chosen_score"])
    if request.against:
        others = Responses.read(load_prompts(str(request.against)), request.column)
        scores = reward_model.score(others.prompts, others.texts, what="scoring --against")
        opponents = {"against": scores_by_prompt(others.prompts, scores)}
        about["against"] = str(request.against)
    if not opponents:
        say("evaluate: no win rate: nothing to compare with; use --against, or data with chosen responses")
    return replace(reward_model.scored(responses), opponents=opponents), about


# of a reward model, and how its line is called
ACCURACIES = {
    "accuracy": "reward model: accuracy",
    "longer_is_better": "accuracy of longer is better",
    "length_controlled": "its length-controlled accuracy",
}


def as_text(results: dict[str, Any]) -> str:
    """Return the results as lines of text."""
    lines = [_line(name, value) for name, value in results["metrics"].items()]
    if against := results.get("against"):
        lines.append(f"  win rate against {against}")
    lines += [_line(name, value) for name, value in results.get("margin_accuracy", {}).items()]
    if "pairs" in results:
        lines.append(f"  accuracies of {results['pairs']} pairs")
    if reward_model := results.get("reward_model"):
        lines += [_line(label, reward_model[key]) for key, label in ACCURACIES.items() if key in reward_model]
    for name, task in results.get("benchmarks", {}).get("tasks", {}).items():
        for metric, value in task["metrics"].items():
            error = "" if value["se"] is None else f" ± {value['se']:.3f}"
            lines.append(f"{name + ', ' + metric:28} {value['mean']:.3f}{error}   (n = {task['n']})")
    if responses := results.get("responses"):
        lines.append(f"responses  {responses['file']}")
    return "\n".join(lines)


def _line(name: str, value: dict[str, Any]) -> str:
    error = "" if value["se"] is None else f" ± {value['se']:.3f}, 95 % {value['low']:.3f} to {value['high']:.3f}"
    return f"{name:28} {value['mean']:.3f}{error}   ({value['n']} prompts)"
