"""`prefdistill judge answers`, `mt-bench` and `alpaca-eval`: responses compared by a language model."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from prefdistill.cli.flags import key_values
from prefdistill.cli.output import show
from prefdistill.cli.verbs.common import MODEL
from prefdistill.core.options import Argument
from prefdistill.evaluation.judges.options import AlpacaEval, Answering, Judging, MTBench
from prefdistill.models.options import Calling


class AnswersFlags(Answering):
    model: str = Field(description=MODEL)
    questions: Path = Field(description="MT-Bench's question.jsonl.")
    out: Path = Field(description="The .jsonl file for the responses, in FastChat's format.")


class JudgeFlags(Judging, Calling):
    fields: Annotated[tuple[str, ...], Argument("KEY=VALUE")] = Field(
        (),
        description="Fields of every request, e.g. temperature=1 or max_completion_tokens=2048 max_tokens=null, which "
        "leaves one out.",
    )
    url: str = Field(
        description="Base URL of the endpoint, e.g. http://localhost:8000/v1. Its key, if it needs one, is read from "
        "the environment: PREFDISTILL_JUDGE_KEY, else OPENAI_API_KEY."
    )
    judge_model: str = Field(description="The judge's name at the endpoint.")
    out: Path = Field(
        description="Directory for verdicts.jsonl and results.json; verdicts in it are not requested again."
    )

    def endpoint(self) -> Any:
        from prefdistill.evaluation.judges.client import Endpoint

        return Endpoint(self.url, self.judge_model, key_values(self.fields), **self.part(Calling))


class MTBenchFlags(JudgeFlags, MTBench):
    pass


class AlpacaEvalFlags(JudgeFlags, AlpacaEval):
    pass


def answers(options: AnswersFlags) -> dict[str, Any]:
    """Generate a model's two-turn responses to MT-Bench's questions, at the temperature of each category.

    Example: prefdistill judge answers --model models/tvkd --questions question.jsonl --out tvkd.jsonl
    """
    from prefdistill.evaluation.judges.answers import answer_questions

    results = answer_questions(options.model, options.questions, options.out, **options.part(Answering))
    ended = f"{results['ended_share']:.0%} ended"
    show(f"{results['answers']} responses ({ended}), {results['tokens']} tokens in {options.out}")
    return results


def mt_bench(options: MTBenchFlags) -> dict[str, Any]:
    """Grade every turn of MT-Bench, and compare with --against in both orders. A rerun requests only what is missing.

    Example: prefdistill judge mt-bench --answers tvkd.jsonl --against dpo.jsonl --questions question.jsonl --prompts
    judge_prompts.jsonl --references reference.jsonl --url http://localhost:8000/v1 --judge-model big --out judged
    """
    from prefdistill.evaluation.judges.mt_bench import judge_mt_bench

    results = judge_mt_bench(options.endpoint(), options.out, **options.part(MTBench))
    for side in ("answers", "against"):
        if side in results.get("single", {}):
            _show_estimate(f"{side}: score", results["single"][side]["score"])
    if "difference" in results.get("single", {}):
        _show_estimate("difference of the scores", results["single"]["difference"])
    _show_verdicts(results, options.out)
    return results


def alpaca_eval(options: AlpacaEvalFlags) -> dict[str, Any]:
    """Compute AlpacaEval's win rate of responses against others, in both orders. A rerun requests only what is missing.

    Example: prefdistill judge alpaca-eval --answers tvkd.jsonl --against dpo.jsonl --url http://localhost:8000/v1
    --judge-model big --out judged --prompt alpaca_eval_clf_gpt4_turbo
    """
    from prefdistill.evaluation.judges.alpaca import judge_alpaca_eval

    results = judge_alpaca_eval(options.endpoint(), options.out, **options.part(AlpacaEval))
    _show_verdicts(results, options.out)
    return results


def _show_estimate(name: str, value: dict[str, Any] | None) -> None:
    if value is None:
        return show(f"{name:28} -")
    interval = f"   95 %: {value['low']:.3f} to {value['high']:.3f}" if "low" in value else ""
    return show(f"{name:28} {value['mean']:.3f}{interval}   ({value['n']} questions)")


def _show_verdicts(results: dict[str, Any], out: Path) -> None:
    if pair := results.get("pair"):
        _show_estimate("win rate", pair["win_rate"])
        if "length_controlled" in pair:
            _show_estimate("win rate at equal length", pair["length_controlled"])
        _show_estimate("both orders agree", pair["consistency"])
        _show_estimate("the first shown is preferred", pair["first_preferred"])
        show(f"{pair['wins']} wins, {pair['ties']} ties, {pair['losses']} losses, {pair['left_out']} left out")
    requests, tokens = results["requests"], results["tokens"]
    cost = "" if results["cost"] is None else f", cost {results['cost']:g}"
    show(
        f"{requests['verdicts']} verdicts ({requests['unparsable']} unparsable, {requests['errors']} errors), "
        f"{tokens['in']:,} + {tokens['out']:,} tokens{cost}\nresults  {out / 'results.json'}"
    )
