"""`prefdistill judge ...`: verb -> function, as in `prefdistill.cli.app`, where what all verbs share is."""

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="judge",
    help="Answers judged by a language model behind an OpenAI-compatible endpoint. The key is read from the "
    "environment (PREFDISTILL_JUDGE_KEY, else OPENAI_API_KEY) and written nowhere.",
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Url = Annotated[
    str,
    typer.Option(
        "--url",
        help="Base URL of the endpoint, e.g. http://localhost:8000/v1. Its key, if it needs one, is read from the "
        "environment: PREFDISTILL_JUDGE_KEY, else OPENAI_API_KEY.",
    ),
]
JudgeModel = Annotated[str, typer.Option("--judge-model", help="The judge's name at the endpoint.")]
Out = Annotated[
    Path, typer.Option("--out", help="Directory for verdicts.jsonl and results.json; what it has is not asked again.")
]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests under way together.")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds without a byte, then it is tried again.")]
Retries = Annotated[int, typer.Option(min=0, help="Further attempts after 429, 5xx, a timeout or a lost connection.")]
PriceIn = Annotated[float | None, typer.Option(min=0, help="Money per million tokens of the judge's input.")]
PriceOut = Annotated[float | None, typer.Option(min=0, help="Money per million tokens of the judge's output.")]
MaxQuestions = Annotated[int | None, typer.Option(min=1, help="Only so many, evenly from the whole file.")]
Fields = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Fields of every request, e.g. temperature=1 or max_completion_tokens=2048 max_tokens=null, which leaves "
        "one out.",
    ),
]


@app.command()
def answers(
    model: Annotated[str, typer.Option("--model", help="Hub name or directory of the model that answers.")],
    questions: Annotated[Path, typer.Option("--questions", help="MT-Bench's question.jsonl.")],
    out: Annotated[Path, typer.Option("--out", help="The .jsonl file for the answers, in FastChat's format.")],
    name: Annotated[str | None, typer.Option(help="model_id of the answers; default: the model's name.")] = None,
    max_questions: MaxQuestions = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer; a longer one is cut.")] = 1024,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens of conversation and answer together.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers generated together.")] = 16,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the draws.")] = 0,
    dtype: Annotated[str, typer.Option(help="dtype of the weights: auto, float32, bfloat16 or float16.")] = "auto",
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Let the model's repository run its own code. Off unless asked for."),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Two-turn answers of a model to MT-Bench's questions, at the temperature of each category.

    Example: prefdistill judge answers --model models/tvkd --questions question.jsonl --out tvkd.jsonl
    """
    from prefdistill.cli.app import _one_process, _print
    from prefdistill.evaluation.judges.answers import answer_questions

    _one_process("judge answers")
    made = answer_questions(
        model,
        questions,
        out,
        name=name,
        max_questions=max_questions,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        batch_size=batch_size,
        seed=seed,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    _print(f"{made['answers']} answers ({made['ended_share']:.0%} ended), {made['tokens']} tokens in {out}")
    return made


@app.command()
def mt_bench(
    answers: Annotated[Path, typer.Option("--answers", help="The answers to judge, in FastChat's format.")],
    questions: Annotated[Path, typer.Option("--questions", help="MT-Bench's question.jsonl.")],
    prompts: Annotated[Path, typer.Option("--prompts", help="FastChat's judge_prompts.jsonl.")],
    references: Annotated[Path, typer.Option("--references", help="Reference answers: math, reasoning and coding.")],
    url: Url,
    judge_model: JudgeModel,
    out: Out,
    fields: Fields = None,
    against: Annotated[Path | None, typer.Option("--against", help="Other answers, to compare with.")] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="single (grades from 1 to 10), pair, or both with a comma; default: all there is."),
    ] = None,
    max_questions: MaxQuestions = None,
    concurrency: Concurrency = 4,
    timeout: Timeout = 120,
    retries: Retries = 5,
    price_in: PriceIn = None,
    price_out: PriceOut = None,
    as_json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """MT-Bench: every turn graded, and compared with --against in both orders. A rerun asks only what is missing.

    Example: prefdistill judge mt-bench --answers tvkd.jsonl --against dpo.jsonl --questions question.jsonl --prompts
    judge_prompts.jsonl --references reference.jsonl --url http://localhost:8000/v1 --judge-model big --out judged
    """
    from prefdistill.cli.app import _listed, _one_process, _overrides
    from prefdistill.evaluation.judges import Endpoint, judge_mt_bench

    _one_process("judge mt-bench")
    results = judge_mt_bench(
        Endpoint(url, judge_model, _overrides(fields), timeout, retries, concurrency),
        out,
        questions=questions,
        prompts=prompts,
        references=references,
        answers=answers,
        against=against,
        kinds=_listed(kind) if kind else None,
        max_questions=max_questions,
        price_in=price_in,
        price_out=price_out,
    )
    for who in ("answers", "against"):
        if who in results.get("single", {}):
            _show(f"{who}: score", results["single"][who]["score"])
    if "difference" in results.get("single", {}):
        _show("difference of the scores", results["single"]["difference"])
    _show_rest(results, out)
    return results


@app.command()
def alpaca_eval(
    answers: Annotated[
        Path, typer.Option("--answers", help="Outputs to judge: instruction and output, or a file of `sample`.")
    ],
    against: Annotated[Path, typer.Option("--against", help="Outputs to compare with, to the same instructions.")],
    url: Url,
    judge_model: JudgeModel,
    out: Out,
    fields: Fields = None,
    prompt: Annotated[
        str,
        typer.Option(
            help="An evaluator of the alpaca_eval package, or a text file with {instruction}, {output_1}, {output_2}. "
            "The default needs an endpoint that gives log-probabilities; alpaca_eval_clf_gpt4_turbo does without."
        ),
    ] = "weighted_alpaca_eval_gpt4_turbo",
    labels: Annotated[
        str | None,
        typer.Option(
            help="What a prompt file has the judge name: first output, second and, if it can, a tie. Default: m,M"
        ),
    ] = None,
    max_questions: MaxQuestions = None,
    concurrency: Concurrency = 4,
    timeout: Timeout = 120,
    retries: Retries = 5,
    price_in: PriceIn = None,
    price_out: PriceOut = None,
    as_json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """AlpacaEval: win rate of outputs against others, in both orders. A rerun asks only what is missing.

    Example: prefdistill judge alpaca-eval --answers tvkd.jsonl --against dpo.jsonl --url http://localhost:8000/v1
    --judge-model big --out judged --prompt alpaca_eval_clf_gpt4_turbo
    """
    from prefdistill.cli.app import _listed, _one_process, _overrides
    from prefdistill.evaluation.judges import Endpoint, judge_alpaca_eval

    _one_process("judge alpaca-eval")
    results = judge_alpaca_eval(
        Endpoint(url, judge_model, _overrides(fields), timeout, retries, concurrency),
        out,
        answers=answers,
        against=against,
        prompt=prompt,
        labels=None if labels is None else _listed(labels),
        max_questions=max_questions,
        price_in=price_in,
        price_out=price_out,
    )
    _show_rest(results, out)
    return results


# -- what these verbs share --------------------------------------------------------------------------------------------


def _show(name: str, value: dict[str, Any] | None) -> None:
    from prefdistill.cli.app import _print

    if value is None:
        return _print(f"{name:28} -")
    interval = f"   95 %: {value['low']:.3f} to {value['high']:.3f}" if "low" in value else ""
    return _print(f"{name:28} {value['mean']:.3f}{interval}   ({value['n']} questions)")


def _show_rest(results: dict[str, Any], out: Path) -> None:
    from prefdistill.cli.app import _print

    if pair := results.get("pair"):
        _show("win rate", pair["win_rate"])
        if "length_controlled" in pair:
            _show("win rate at equal length", pair["length_controlled"])
        _show("both orders agree", pair["consistency"])
        _show("the first shown is preferred", pair["first_preferred"])
        _print(f"{pair['wins']} wins, {pair['ties']} ties, {pair['losses']} losses, {pair['left_out']} left out")
    asked, tokens = results["requests"], results["tokens"]
    cost = "" if results["cost"] is None else f", cost {results['cost']:g}"
    _print(
        f"{asked['verdicts']} verdicts ({asked['unparsable']} unparsable, {asked['errors']} errors), "
        f"{tokens['in']:,} + {tokens['out']:,} tokens{cost}\nresults  {out / 'results.json'}"
    )
