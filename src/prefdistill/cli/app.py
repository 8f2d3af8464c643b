"""The command line: verb -> function, nothing else. Heavy imports wait until a verb runs."""

import errno
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext, redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from prefdistill import __version__
from prefdistill.cli.judge import app as judge_app
from prefdistill.core.errors import UserError
from prefdistill.core.text import printable, surrogate

# Newer typers carry their own click: the error of a bad command line is found through typer's public subclass of it.
UsageError: type[Any] = typer.BadParameter.__mro__[1]

INTERRUPTED = 130

app = typer.Typer(
    name="prefdistill",
    help="Preference distillation for small language models: pairs + teacher + student in, an aligned student and an "
    "honest report card out.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(judge_app)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. training.learning_rate=1e-6")
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of weights, data order and sampling.")]
DATA_HELP = "Preference pairs: Hub name (org/name#split), directory, .jsonl, .jsonl.gz or .parquet."
Data = Annotated[str, typer.Option("--data", help=DATA_HELP)]
MaxLength = Annotated[int, typer.Option(min=1, help="Tokens of prompt and response; the response is cut on the right.")]
MaxPrompt = Annotated[int | None, typer.Option(min=1, help="Tokens of the prompt; a longer one keeps its end.")]
Dtype = Annotated[str, typer.Option(help="dtype of the weights: auto, float32, bfloat16 or float16.")]
Quantization = Annotated[
    str | None,
    typer.Option(help="Read the weights in 4bit or 8bit (bitsandbytes); a quantised checkpoint needs no option."),
]
Methods = Annotated[
    str | None,
    typer.Option(help="Only these of the recipe, e.g. dpo,tvkd (its baseline always runs), or all it knows."),
]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the model's repository run its own code. Off unless asked for.")
]


@app.command()
def quickstart(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/quickstart"),
    seed: Seed = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Full runs, each with its own models and data.")] = 1,
    methods: Methods = None,
    as_json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """The whole pipeline on a built-in task with a known reward: offline, on a CPU, in minutes.

    Example: prefdistill quickstart --out runs/first --seed 1 --methods all
    """
    recipe = Path(__file__).parents[1] / "experiment" / "recipes" / "quickstart.yaml"
    return _run(recipe, out, [f"seed={seed}", f"seeds={seeds}", *(overrides or [])], fast=False, only=methods)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory; default: runs/NAME of the recipe, runs/NAME-fast with --fast.")
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="The recipe's small profile: everything runs, nothing is learnt.")
    ] = False,
    methods: Methods = None,
    as_json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Every stage of a recipe. Finished stages are reused, an interrupted one goes on.

    Example: prefdistill run recipes/local-pairs/tvkd.yaml data.train=pairs.jsonl data.test=held-out.jsonl
    """
    return _run(recipe, out, overrides or [], fast=fast, only=methods)


def _run(
    recipe_path: Path, out: Path | None, overrides: list[str], *, fast: bool, only: str | None = None
) -> dict[str, Any]:
    _one_process("run")
    from prefdistill.experiment.recipe import load_recipe

    names = None if only is None else [name.strip() for name in only.split(",")]
    recipe = load_recipe(recipe_path, overrides, fast=fast, only=names)
    if fast and not recipe.fast:
        raise UserError(f"{recipe_path} has no section `fast`, the overrides of --fast; add one, or leave --fast out")
    _refuse_idle(overrides, list(recipe.methods))
    # results of the small profile would replace the whole run's
    out = out or Path("runs") / (f"{recipe.name}-fast" if fast else recipe.name)
    from prefdistill.core.progress import say
    from prefdistill.experiment.run import run_recipe
    from prefdistill.report import method_table, verdict

    results = run_recipe(recipe, out, command=" ".join(["prefdistill", *sys.argv[1:]]))
    for warning in results["warnings"]:
        say(f"warning: {warning}")
    _print(f"{method_table(results)}\n\n{verdict(results)}\n")
    _print(f"results  {out / 'results.json'}\nreport   {out / 'report.html'}")
    return results


def _refuse_idle(overrides: list[str], methods: list[str]) -> None:
    """An option of a method that does not run would have no effect, and nobody would look at its value."""
    from prefdistill.core.options import Override

    for text in overrides:
        section, _, rest = Override.parse(text).key.partition(".")
        name = rest.partition(".")[0]
        if section == "methods" and name and name not in methods:
            raise UserError(f"{text}: {name} is not among the methods that run ({', '.join(methods)}); see --methods")


@app.command()
def sft(
    model: Annotated[str, typer.Option("--model", help="Hub name or directory to start from.")],
    data: Annotated[
        str, typer.Option("--data", help="Rows with messages, prompt and completion, or pairs (the chosen).")
    ],
    out: Annotated[Path, typer.Option("--out", help="Directory for the trained model.")],
    overrides: Overrides = None,
    seed: Seed = 0,
    max_length: MaxLength = 1024,
    dtype: Dtype = "float32",
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Supervised fine-tuning through TRL: a teacher's or a student's start.

    Example: prefdistill sft --model my/base --data sft.jsonl --out models/sft learning_rate=2e-5 epochs=3
    """
    from prefdistill.data.fingerprint import demonstrations_fingerprint
    from prefdistill.data.load import load_messages
    from prefdistill.training.options import Training
    from prefdistill.training.trl import train_sft

    training = _training(Training, overrides)
    rows = load_messages(data)
    options = {"dtype": dtype, "seed": seed, "trust_remote_code": trust_remote_code}
    return _teach("sft", train_sft, model, rows, demonstrations_fingerprint(rows), training, out, max_length, options)


@app.command()
def dpo(
    model: Annotated[str, typer.Option("--model", help="Hub name or directory to start from; also the reference.")],
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="Directory for the trained model.")],
    overrides: Overrides = None,
    seed: Seed = 0,
    max_length: MaxLength = 1024,
    dtype: Dtype = "float32",
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """DPO through TRL: makes the teacher.

    Example: prefdistill dpo --model models/teacher-sft --data pairs.jsonl --out models/teacher beta=0.01
    """
    from prefdistill.data.fingerprint import data_fingerprint
    from prefdistill.data.load import load_pairs
    from prefdistill.training.options import DPOTraining
    from prefdistill.training.trl import train_dpo

    training = _training(DPOTraining, overrides)
    pairs = load_pairs(data)
    options = {"dtype": dtype, "seed": seed, "trust_remote_code": trust_remote_code}
    return _teach("dpo", train_dpo, model, pairs, data_fingerprint(pairs), training, out, max_length, options)


@app.command()
def sample(
    model: Annotated[str, typer.Option("--model", help="Hub name or directory of the model that answers.")],
    data: Annotated[
        str,
        typer.Option("--data", help="Rows with a prompt, preference pairs, or messages; Hub name, directory or file."),
    ],
    out: Annotated[Path, typer.Option("--out", help="File for the rows: .jsonl, .jsonl.gz or .parquet.")],
    column: Annotated[
        str, typer.Option(help="Column for the responses, e.g. student_response or teacher_response.")
    ] = "completion",
    n: Annotated[int, typer.Option("--n", min=1, help="Responses per prompt, a row each.")] = 1,
    temperature: Annotated[float, typer.Option(min=0, help="Of the distribution that is drawn from; 0 is greedy.")] = 1,
    top_p: Annotated[float, typer.Option(help="Draw from the most likely tokens of this probability together.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a response; a longer one is cut.")] = 512,
    max_length: MaxLength = 1024,
    max_prompt_length: MaxPrompt = None,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Responses generated together; vLLM decides itself.")] = 64,
    engine: Annotated[str, typer.Option(help="transformers, or vllm where it is installed.")] = "transformers",
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Responses of a model to every prompt, as a data file like any other. An interrupted file is gone on with.

    Example: prefdistill sample --model my/student --data pairs.jsonl --out own.jsonl --column student_response
    """
    _one_process("sample")
    from prefdistill.core.artifact import sidecar
    from prefdistill.core.files import read_json
    from prefdistill.data.truncation import Truncation
    from prefdistill.sampling.files import sample_responses

    reused = out.exists()  # what is there is taken as it is, or refused
    sample_responses(
        model,
        data,
        out=out,
        column=column,
        n=n,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        truncation=Truncation(max_length, max_prompt_length),
        batch_size=batch_size,
        seed=seed,
        engine=engine,
        dtype=dtype,
        quantization=quantization,
        trust_remote_code=trust_remote_code,
    )
    made = read_json(sidecar(out))
    told = ("responses", "tokens", "ended_share", "other_tokens_share", "tokens_per_second")
    shown = {key: made[key] for key in told}
    ended, speed = f"{shown['ended_share']:.0%} ended", f"{shown['tokens_per_second']:g} tokens/s"
    _print(f"{shown['responses']} responses ({ended}), {shown['tokens']} tokens ({speed}) in {out}")
    return {"out": str(out), **shown, "reused": reused}


@app.command()
def signals(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", help="Directory of the signal store.")],
    model: Annotated[
        str | None, typer.Option("--model", help="Hub name or directory of the model that is asked.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help=DATA_HELP)] = None,
    kind: Annotated[
        str, typer.Option(help="Of values, logprob_values, logps, q and topk, with commas.")
    ] = "values,logps",
    role: Annotated[
        str,
        typer.Option(help="teacher, teacher_reference, reference (the student's start), or student (a trained one)."),
    ] = "teacher",
    responses: Annotated[
        str, typer.Option(help="Columns to read, with commas, e.g. student_response of `prefdistill sample`.")
    ] = "chosen,rejected",
    k: Annotated[str, typer.Option("--k", help="Tokens of each distribution in topk; vocab is all of them.")] = "50",
    p: Annotated[float | None, typer.Option("--p", help="Fewer, where fewer hold this share of the mass.")] = None,
    ids_from: Annotated[
        Path | None, typer.Option(help="A teacher's topk store at whose token ids this one is read.")
    ] = None,
    max_length: MaxLength = 1024,
    max_prompt_length: MaxPrompt = None,
    positions: Annotated[
        Literal["all", "endpoints"],
        typer.Option(help="Values of all states, or of the endpoints only, all that TVKD needs with discount 1."),
    ] = "all",
    value_dtype: Annotated[
        Literal["float32", "float16"], typer.Option(help="What values are stored in; float16 is half the size.")
    ] = "float32",
    topk_coding: Annotated[
        Literal["packed", "float32"] | None,
        typer.Option(help="packed (2.5 bytes an id) or float32 (exact, 8 bytes); default: exact for --k vocab only."),
    ] = None,
    value_temperature: Annotated[float, typer.Option(help="b of the soft value b*logsumexp(z/b).")] = 1.0,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="dtype of the weights; default: float32 for a reference, else bfloat16 where the hardware multiplies "
            "it fast, else as stored."
        ),
    ] = None,
    quantization: Quantization = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="bfloat16 autocast, as in a bf16 training run.")] = False,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Padded tokens per forward pass.")] = 16_384,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Make the damaged files of --out again, and no others, by the options it was made with; --model and "
            "--data only where they lie elsewhere now.",
        ),
    ] = False,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """What a model says about each response, stored: soft values of every state (values, from raw logits, or
    logprob_values), log-probability of the response (logps), its raw logits (q), the likeliest tokens (topk).

    Example: prefdistill signals --model my/teacher --data pairs.jsonl --out signals/teacher --kind topk --k 50
    or, where a file of it is damaged: prefdistill signals --repair --out signals/teacher
    """
    from prefdistill.data.truncation import Truncation
    from prefdistill.evaluation import gauge_flips
    from prefdistill.signals import Signals, extract_signals, repair_signals

    if repair:
        _only(context, "--repair", ("out", "model", "data", "ids_from", "trust_remote_code", "as_json", "debug"))
        ids = Signals.open(ids_from) if ids_from else None
        store, damaged = repair_signals(out, model, data, ids_from=ids, trust_remote_code=trust_remote_code)
        _print("\n".join([f"made again: {name}" for name in damaged] or [f"{out} is whole"]))
        return {"out": str(out), "damaged": damaged, "pairs": len(store.rows), "rows": len(store)}
    if model is None or data is None:
        raise UserError(f"--{'data' if model else 'model'} is missing: whose signals, and of which pairs")
    if not (k == "vocab" or k.isdecimal()):
        raise UserError(f"--k takes a number of tokens or the word vocab, got {k!r}")
    store = extract_signals(
        model,
        data,
        kinds=_listed(kind),
        out=out,
        role=role,
        responses=_listed(responses),
        truncation=Truncation(max_length, max_prompt_length),
        positions=positions,
        value_dtype=value_dtype,
        topk_coding=topk_coding,
        value_temperature=value_temperature,
        k="vocab" if k == "vocab" else int(k),
        p=p,
        ids_from=Signals.open(ids_from) if ids_from else None,
        dtype=dtype,
        quantization=quantization,
        bf16=bf16,
        batch_tokens=batch_tokens,
        trust_remote_code=trust_remote_code,
    )
    size = sum(path.stat().st_size for path in (out / "shards").iterdir())
    _print(f"{len(store.rows)} of {len(store)} rows, {', '.join(store.kinds)}, {size:,} bytes in {out}")
    found = {"out": str(out), "pairs": len(store.rows), "rows": len(store), "kinds": list(store.kinds), "bytes": size}
    if error := store.manifest["topk"].get("kl_error"):
        found["kl_error"] = error
        _print(f"packing moved the distributions by {error['mean']:.1e} nats on average ({error['max']:.1e} at most)")
    if "values" in store.kinds and positions == "all" and {"chosen", "rejected"} <= set(store.responses):
        found["gauge_flips"] = flips = gauge_flips(store)
        _print(
            f"the value's order of {flips['mean']:.0%} of the pairs turns under a change of gauge that no policy shows "
            f"(± {flips['se']:.1%} over {flips['n']} random ones; 50% would be all gauge)"
        )
    return found


@app.command()
def distill(
    student: Annotated[str, typer.Option("--student", help="Hub name or directory of the student's start.")],
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="Directory for the trained student.")],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="sft, dpo, tvkd, vanillakd, seqkd, dckd, adpa, dpkd, simpo, wpo, dadpo or distillm2.",
        ),
    ] = "tvkd",
    signals: Annotated[list[Path] | None, typer.Option("--signals", help="Signal stores; once for each.")] = None,
    overrides: Overrides = None,
    seed: Seed = 0,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Only for methods without signals (1024); others truncate as these did.")
    ] = None,
    max_prompt_length: MaxPrompt = None,
    dtype: Dtype = "float32",
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Train the student with a method. KEY=VALUE sets the method's options and the training's.

    Example: prefdistill distill --student my/student --data pairs.jsonl --signals signals/teacher --signals
    signals/reference --method tvkd --out models/tvkd alpha=0.7 beta=0.1 learning_rate=1e-6
    """
    from prefdistill.core.files import file_digest
    from prefdistill.core.progress import say
    from prefdistill.data.fingerprint import data_fingerprint
    from prefdistill.data.load import load_pairs
    from prefdistill.data.truncation import Truncation
    from prefdistill.evaluation.shaping import drowning
    from prefdistill.methods import METHODS, make_method
    from prefdistill.models.load import load_model, load_tokenizer
    from prefdistill.signals import Signals
    from prefdistill.training.factory import make_trainer
    from prefdistill.training.loop import fit
    from prefdistill.training.options import Training

    truncation = Truncation(max_length or 1024, max_prompt_length) if max_length or max_prompt_length else None
    given = _overrides(overrides)
    of_method = METHODS[method].__dataclass_fields__ if method in METHODS else {}
    chosen = make_method(method, {key: value for key, value in given.items() if key in of_method})
    training = _training(Training, {key: value for key, value in given.items() if key not in of_method}, of_method)
    pairs = load_pairs(data, responses=chosen.responses)
    stores = [Signals.open(path) for path in signals or []]
    tokenizer = load_tokenizer(student, trust_remote_code=trust_remote_code)

    def make(directory: Path) -> None:
        trainer = make_trainer(
            chosen,
            lambda: load_model(student, dtype=dtype, trust_remote_code=trust_remote_code),
            pairs,
            tokenizer,
            training,
            directory,
            signals=stores,
            truncation=truncation,
            seed=seed,
        )
        fit(trainer, directory, method)
        if text := drowning(method, trainer.state.log_history):
            say(f"warning: {text}")

    request = {
        "trust_remote_code": trust_remote_code,
        "data": data_fingerprint(pairs, chosen.responses),
        "method": method,
        "options": repr(chosen),
        "training": training.cache_key(),
        "signals": [file_digest(path / "manifest.json") for path in signals or []],
        "truncation": str(truncation),
        "seed": seed,
        "dtype": dtype,
    }
    return _stage(f"distill {method}", out, student, request, make)


@app.command()
def evaluate(
    out: Annotated[Path, typer.Option("--out", help="File for the results (JSON).")],
    model: Annotated[str | None, typer.Option("--model", help="Hub name or directory of the student.")] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Held-out pairs, or rows with prompt and completion; Hub name, directory or file."),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option("--reference", help="Pairs: logps signals of the student's start on this data.")
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option("--teacher", help="Pairs: values,logps signals of the teacher on this data.")
    ] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="Answer each prompt once; responses are kept beside --out.")
    ] = False,
    generations: Annotated[
        Path | None, typer.Option("--generations", help="Responses in a file, in place of sampling them.")
    ] = None,
    reward_model: Annotated[
        str | None,
        typer.Option("--reward-model", help="Score responses: Hub name or directory of a one-label classifier."),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="Win rate against these responses; default: the chosen ones of --data."),
    ] = None,
    column: Annotated[str, typer.Option(help="Where --generations and --against keep the responses.")] = "response",
    length_ranges: Annotated[
        str, typer.Option(help="Edges in words of the reference, e.g. 5,10,50; default: quartiles.")
    ] = "",
    prompts: Annotated[int | None, typer.Option(min=1, help="Answer the first prompts only.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="Of the responses; 0 is greedy.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a response; a longer one is cut.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Responses generated together.")] = 64,
    engine: Annotated[str, typer.Option(help="transformers, or vllm where it is installed.")] = "transformers",
    lm_eval: Annotated[
        str,
        typer.Option("--lm-eval", help="Benchmarks, with commas: tasks of lm-evaluation-harness, open-llm-leaderboard"),
    ] = "",
    lm_eval_include: Annotated[Path | None, typer.Option(help="A directory with task files of your own.")] = None,
    lm_eval_batch_size: Annotated[int, typer.Option(min=1, help="Requests of a benchmark read together.")] = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="The first items of each benchmark only.")] = None,
    seed: Seed = 0,
    dtype: Dtype = "float32",
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """What a student is worth: on held-out pairs, by its responses, by a reward model, on benchmarks.

    Example: prefdistill evaluate --model models/tvkd --data test.jsonl --reward-model my/judge --out e.json
    """
    _one_process("evaluate")
    from prefdistill.core.files import sweep, write_json
    from prefdistill.core.lock import locked
    from prefdistill.core.paths import check_file
    from prefdistill.evaluation import evaluate as evaluation
    from prefdistill.evaluation.options import EvaluateRequest

    check_file(out, '{\n  "model":', "evaluate")
    if not all(edge.isdecimal() for edge in _listed(length_ranges)):
        raise UserError(f"--length-ranges takes numbers of words with commas, e.g. 5,10,50; got {length_ranges!r}")
    edges = tuple(int(edge) for edge in _listed(length_ranges))
    if any(low >= high for low, high in pairwise(edges)):
        raise UserError(f"--length-ranges takes numbers that rise, e.g. 5,10,50; got {length_ranges!r}")
    request = EvaluateRequest.of(
        "evaluate",
        model=model,
        data=data,
        reference=reference,
        teacher=teacher,
        generate=generate,
        generations=generations,
        against=against,
        column=column,
        reward_model=reward_model,
        length_ranges=edges,
        prompts=prompts,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        engine=engine,
        lm_eval=_listed(lm_eval),
        lm_eval_include=lm_eval_include,
        lm_eval_batch_size=lm_eval_batch_size,
        limit=limit,
        seed=seed,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    with locked(out.parent, f".{out.name}.lock"):
        sweep(out.parent, out.name)
        results = evaluation.evaluate(request, out)
        write_json(out, results)
    _print(evaluation.as_text(results))
    return results


@app.command()
def inspect(
    data: Data,
    signals: Annotated[list[Path], typer.Option("--signals", help="Signal stores for these pairs; once for each.")],
    out: Annotated[Path, typer.Option("--out", help="File to write (HTML).")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Hub name or directory; default: the one that the signals name.")
    ] = None,
    max_pairs: Annotated[int, typer.Option(min=1, help="The page holds the first of the pairs.")] = 5_000,
    alpha: Annotated[float, typer.Option(help="Weight of the shaping margin on the page.")] = 0.7,
    beta: Annotated[float, typer.Option(help="Weight of the DPO margin on the page.")] = 0.1,
    discount: Annotated[float, typer.Option(min=0, max=1, help="gamma of psi.")] = 1.0,
    terminal: Annotated[
        Literal["last", "bootstrap", "zero"], typer.Option(help="What stands for the value after an end token.")
    ] = "last",
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """The token view: one page with V, psi and probabilities over the text of chosen and rejected.

    Example: prefdistill inspect --data pairs.jsonl --signals signals/teacher --out tokens.html
    """
    _one_process("inspect")
    from prefdistill.models.load import load_tokenizer
    from prefdistill.report.token_data import Weights
    from prefdistill.report.tokens import write_token_view
    from prefdistill.signals import Signals

    stores = [Signals.open(path) for path in signals]
    made = write_token_view(
        data,
        stores,
        out,
        None if tokenizer is None else load_tokenizer(tokenizer, trust_remote_code=trust_remote_code),
        max_pairs=max_pairs,
        weights=Weights(alpha, beta, discount, terminal),
        trust_remote_code=trust_remote_code,
    )
    _print(f"{made['pairs']} of {made['rows']} pairs, {made['bytes']:,} bytes in {out}")
    return made


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.")],
    out: Annotated[Path, typer.Option("--out", help="File to write.")],
    format: Annotated[str | None, typer.Option("--format", help="html or md; default: by the file's name.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """One self-contained page from one or more run directories.

    Example: prefdistill report runs/quickstart runs/tvkd --out report.html
    """
    _one_process("report")
    from prefdistill.report import write_report

    ending, endings = out.suffix.lower(), {"": "html", ".html": "html", ".htm": "html", ".md": "md"}
    if format is None and ending not in endings:
        raise UserError(f"{out}: unknown file type. Give --out a name that ends in .html or .md, or say --format.")
    write_report(runs, out, format=format or endings[ending])
    _print(str(out))
    return {"out": str(out), "runs": [str(path) for path in runs]}


@app.command()
def study(
    file: Annotated[Path, typer.Argument(help="Study file (YAML); the shipped ones are under studies/.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Directory; default: runs/studies/NAME of the study.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Seeds of each cell, in place of the file's.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="Recipe to study, in place of the file's.")] = None,
    metric: Annotated[str | None, typer.Option(help="What is plotted, in place of the file's.")] = None,
    stages: Annotated[
        Path | None,
        typer.Option(help="Where finished stages are shared; give several studies the same. Default: OUT/stages."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """A recipe with some of its settings varied: only cells that are missing or stale are run; a table and a plot.

    Example: prefdistill study studies/alpha.yaml --seeds 3 --stages runs/studies/stages
    """
    _one_process("study")
    from prefdistill.experiment.study.run import run_study
    from prefdistill.report.study import answers

    results = run_study(
        file,
        out,
        overrides=overrides or [],
        seeds=seeds,
        recipe=recipe,
        metric=metric,
        stages=stages,
        command=" ".join(["prefdistill", *sys.argv[1:]]),
    )
    _print("\n".join([results["question"], *answers(results)]))
    _print(f"page  {(out or Path('runs') / 'studies' / results['study']) / 'study.html'}")
    return results


@app.command()
def doctor(
    overrides: Overrides = None,
    data: Annotated[str | None, typer.Option("--data", help="Preference pairs to train on.")] = None,
    test: Annotated[str | None, typer.Option("--test", help="Held-out pairs, to look for leaks too.")] = None,
    teacher: Annotated[str | None, typer.Option("--teacher", help="Hub name or directory of the teacher.")] = None,
    student: Annotated[str | None, typer.Option("--student", help="Hub name or directory of the student.")] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Recipe (YAML) whose run is planned; the options win over it.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Where the run will write; its disk is looked at.")] = Path("runs"),
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of prompt and response; default: the recipe's, or 1024."),
    ] = None,
    max_prompt_length: MaxPrompt = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Data, chat template, token boundaries, vocabularies, memory and disk, before anything runs. No weights are
    loaded. Status 2 if something is wrong, 0 if there are only warnings and notes. KEY=VALUE is for the recipe.

    Example: prefdistill doctor --data pairs.jsonl --test test.jsonl --teacher my/teacher --student my/student
    """
    _one_process("doctor")
    from prefdistill.core.options import Override
    from prefdistill.data.truncation import Truncation
    from prefdistill.experiment.doctor import as_text, examine
    from prefdistill.experiment.recipe import load_recipe

    if overrides and recipe is None:
        raise UserError(f"{overrides[0]!r} is an override of a recipe; give --recipe with it")
    if recipe is None:
        truncation = Truncation(max_length or 1024, max_prompt_length)
        checkup = examine(data, test, teacher, student, truncation, out=out, trust_remote_code=trust_remote_code)
    else:
        given = {
            "data.train": data,
            "data.test": test,
            "data.max_length": max_length,
            "data.max_prompt_length": max_prompt_length,
            "model.teacher": teacher,
            "model.student": student,
            "model.trust_remote_code": trust_remote_code or None,
        }
        changes = [Override(key, value) for key, value in given.items() if value is not None]
        checkup = examine(recipe=load_recipe(recipe, [*(overrides or []), *changes]), out=out)
    _print(as_text(checkup))
    return checkup.to_json()


# -- what every verb shares --------------------------------------------------------------------------------------------


def _print(text: str) -> None:
    """For a person, once; under --json stdout is for the JSON object alone, and this goes to stderr."""
    if _main_process():
        print(text)


def _main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _overrides(given: list[str] | None) -> dict[str, Any]:
    from prefdistill.core.options import Override

    raw: dict[str, Any] = {}
    for text in given or []:
        Override.parse(text).apply(raw)
    return raw


def _training(kind: type[Any], overrides: "list[str] | dict[str, Any] | None", also: Iterable[str] = ()) -> Any:
    from prefdistill.core.options import validate

    raw = overrides if isinstance(overrides, dict) else _overrides(overrides)
    return validate(kind, raw, "command line", also)


def _only(context: typer.Context, option: str, others: tuple[str, ...]) -> None:
    """Beside some options only a few others have a meaning."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and name not in (option.strip("-"), *others):
            raise UserError(f"{option} goes by what the store says of itself: leave --{name.replace('_', '-')} out")


def _one_process(verb: str) -> None:
    """Some verbs know nothing of other processes, which would all write the same files."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"`prefdistill {verb}` runs in one process; launch sft, dpo, signals and distill on several")


def _teach(
    name: str,
    train: Callable[..., None],
    model: str,
    rows: Any,
    fingerprint: str,
    training: Any,
    out: Path,
    max_length: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    """One of TRL's trainings."""
    from prefdistill.data.truncation import Truncation
    from prefdistill.models.load import load_tokenizer

    tokenizer = load_tokenizer(model, trust_remote_code=options["trust_remote_code"])
    request = {
        "data": fingerprint,
        "training": training.cache_key(),
        **options,
        "max_length": max_length,
    }

    def make(directory: Path) -> None:
        train(model, rows, tokenizer, training, directory, truncation=Truncation(max_length), **options)

    return _stage(name, out, model, request, make)


def _stage(name: str, out: Path, model: str, request: dict[str, Any], make: Any) -> dict[str, Any]:
    """A training of `model`, as a stage of its own."""
    from prefdistill.core.lock import locked
    from prefdistill.core.stages import run_stage
    from prefdistill.experiment.inputs import Sources

    sources = Sources()
    with locked(out, together=True):
        stage = run_stage(name, out, {"model": sources.model_key(model), **request}, sources.unchanged([model], make))
    _print(f"{name}: {out}")
    return {"out": str(out), "seconds": stage.seconds, "reused": stage.reused}


def call(arguments: list[str]) -> int:
    asks_for_help = not {"-h", "--help"}.isdisjoint(arguments)
    as_json, debug = "--json" in arguments and not asks_for_help, "--debug" in arguments
    _quieten()
    try:
        if broken := [given for given in arguments if surrogate(given) is not None]:
            raise UserError(f"{broken[0]!a} is not UTF-8 text, which no result could be written with; rename it")
        if "--out=" in arguments or ("--out", "") in pairwise(arguments):  # to Path, that is the working directory
            raise UserError("--out is empty; name the place for what is made")
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            result = app(args=arguments or ["--help"], prog_name="prefdistill", standalone_mode=False)
        if result == INTERRUPTED:  # a verb returns a dict; a number is the status typer would have exited with
            raise KeyboardInterrupt
        if isinstance(result, int):
            return result
        if as_json and _main_process():
            print(json.dumps(result, ensure_ascii=False))
        if isinstance(result, dict) and result.get("ok") is False:  # a verb that looks has found what is wrong
            return 2
    except UserError as error:
        return _fail(str(error), 2, debug)
    except UsageError as error:
        where = getattr(error, "ctx", None)
        hint = f" (see `{where.command_path} --help`)" if where else ""
        return _fail(f"{error.format_message()}{hint}", 2, debug)
    except KeyboardInterrupt:
        print(
            "prefdistill: interrupted; what was finished is kept, the same command goes on from there", file=sys.stderr
        )
        return INTERRUPTED
    except Exception as error:
        if debug:
            raise
        from prefdistill.core.files import disk_full

        if disk_full(error):
            where = getattr(error, "filename", None)
            reason = f"no room on the disk{f' for {where}' if where else ''} ({' '.join(str(error).split())})"
            return _fail(f"{reason}; make some, and the same command goes on", 1, debug)
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            return _fail(f"{str(error.filename)[:60]}...: the name is too long; give a shorter one", 2, debug)
        if isinstance(error, PermissionError) and error.filename:
            return _fail(f"{error.filename}: permission denied; give another, or see to its owner and mode", 2, debug)
        if isinstance(error, typer.Abort) and error.__cause__ is not None:  # typer's name for an EOFError
            error = error.__cause__  # type: ignore[assignment]
        reason = " ".join(str(error).split()) or type(error).__name__
        return _fail(f"{type(error).__name__}: {reason}\n(--debug shows where)", 1, debug)
    return 0


def _quieten() -> None:
    """What the libraries below say to their own developers, and bars drawn into a log file, are not for our users."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        for library in ("HF_DATASETS", "HF_HUB"):
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that a CPU does not have


def _fail(message: str, status: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    lines = map(printable, message.split("\n"))  # names and text of files are from anybody
    print("prefdistill:", "\n".join(lines), file=sys.stderr)
    return status


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
