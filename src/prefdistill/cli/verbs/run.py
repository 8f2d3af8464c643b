"""`prefdistill quickstart`, `plan`, `run` and `study`: whole recipes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveInt

from prefdistill.cli.output import show
from prefdistill.cli.verbs.common import Overridable, command_line
from prefdistill.core.errors import UserError
from prefdistill.core.options import Argument, Override, Section, Seeded
from prefdistill.data.options import Synthetic
from prefdistill.experiment.hardware import Scale
from prefdistill.training.options import Training

if TYPE_CHECKING:
    from prefdistill.experiment.recipe import Recipe


class MethodFlags(Section):
    methods: tuple[str, ...] | None = Field(
        None, description="Comma-separated: run only these methods of the recipe and its baseline, or all it has."
    )


class QuickstartFlags(Overridable, MethodFlags, Seeded):
    out: Path = Field(Path("runs/quickstart"), description="Run directory.")
    seeds: PositiveInt = Field(1, description="Full runs, each with its own models and data.")
    teacher_tokenizer: Literal["same", "other"] = Synthetic.redefault("teacher_tokenizer", "same")


def quickstart(options: QuickstartFlags) -> dict[str, Any]:
    """Run the whole pipeline on a built-in task with a known reward: offline, on a CPU, in minutes.

    Example: prefdistill quickstart --out runs/first --seed 1 --methods all
    """
    recipe = Path(__file__).parents[2] / "experiment" / "recipes" / "quickstart.yaml"
    flags = {
        "seed": options.seed,
        "seeds": options.seeds,
        "data.synthetic.teacher_tokenizer": options.teacher_tokenizer,
    }
    overrides = (*(f"{key}={value}" for key, value in flags.items()), *options.overrides)
    return run(RunFlags(recipe=recipe, out=options.out, overrides=overrides, methods=options.methods))


class RecipeFlags(Overridable, MethodFlags):
    recipe: Annotated[Path, Argument("RECIPE")] = Field(description="Recipe file (YAML).")
    out: Path | None = Field(
        None, description="Run directory; default: runs/NAME of the recipe, runs/NAME-fast with --fast."
    )
    fast: bool = Field(False, description="Use the recipe's small profile: a quick check that everything runs.")


class RunFlags(RecipeFlags):
    verify: bool = Training.redefault("verify", True)


class PlanFlags(RecipeFlags, Scale):
    pass


def plan(options: PlanFlags) -> dict[str, Any]:
    """List the steps of a recipe before they run: rows, tokens, memory and disk of each, and what a run will reuse,
    resume or rebuild, and why. Reads data and tokenizers; loads no weights and writes nothing. With --gpu, --devices,
    --pairs and so on also operations, memory per device, hours, and what to change where a step does not fit.

    Example: prefdistill plan recipes/local-pairs/tvkd.yaml data.train=pairs.jsonl data.test=held-out.jsonl
    """
    recipe, out = _recipe(options)
    from prefdistill.experiment.show_plan import as_text, plan_recipe

    planned = plan_recipe(recipe, out, Scale(**options.part(Scale)))
    show(as_text(planned))
    return planned


def run(options: RunFlags) -> dict[str, Any]:
    """Run every step of a recipe. Finished steps are reused, an interrupted one resumes.

    Example: prefdistill run recipes/local-pairs/tvkd.yaml data.train=pairs.jsonl data.test=held-out.jsonl
    """
    if not options.verify:
        options = options.model_copy(update={"overrides": ("training.verify=false", *options.overrides)})
    recipe, out = _recipe(options)
    from prefdistill.core.progress import say
    from prefdistill.evaluation.reliability import reward_model_sentence
    from prefdistill.experiment.run import run_recipe
    from prefdistill.report import method_table, verdict

    results = run_recipe(recipe, out, command=command_line())
    for warning in results["warnings"]:
        say(f"warning: {warning}")
    show("\n\n".join(filter(None, [method_table(results), reward_model_sentence(results), f"{verdict(results)}\n"])))
    show(f"results  {out / 'results.json'}\nreport   {out / 'report.html'}")
    return results


def _recipe(options: RecipeFlags) -> tuple["Recipe", Path]:
    """Load the recipe; return it with the run directory."""
    from prefdistill.experiment.recipe import load_recipe

    path, overrides, fast = options.recipe, list(options.overrides), options.fast
    recipe = load_recipe(path, overrides, fast=fast, only=None if options.methods is None else list(options.methods))
    if fast and not recipe.fast:
        raise UserError(f"{path} has no section `fast`, the overrides of --fast; add one, or leave --fast out")
    for text in overrides:  # of a method that does not run, where they have no effect and are not checked
        section, _, rest = Override.parse(text).key.partition(".")
        name = rest.partition(".")[0]
        if section == "methods" and name and name not in recipe.methods:
            raise UserError(
                f"{text}: {name} is not among the methods that run ({', '.join(recipe.methods)}); see --methods"
            )
    # results of the small profile must not replace those of the whole run
    return recipe, options.out or Path("runs") / (f"{recipe.name}-fast" if fast else recipe.name)


class StudyFlags(Overridable):
    file: Annotated[Path, Argument("FILE")] = Field(
        description="Study file (YAML); the shipped ones are under studies/."
    )
    out: Path | None = Field(None, description="Directory; default: runs/studies/NAME of the study.")
    seeds: PositiveInt | None = Field(None, description="Seeds of each cell, in place of the file's.")
    recipe: Path | None = Field(None, description="Recipe to study, in place of the file's.")
    metric: str | None = Field(None, description="Metric to plot, in place of the file's.")
    stages: Path | None = Field(
        None, description="Directory of finished steps that several studies share; default: OUT/stages."
    )


def study(options: StudyFlags) -> dict[str, Any]:
    """Run a recipe with some of its settings varied: only missing or stale cells are run; a table and a plot.

    Example: prefdistill study studies/alpha.yaml --seeds 3 --stages runs/studies/stages
    """
    from prefdistill.experiment.study.run import run_study
    from prefdistill.report.study import answers

    out = options.out
    results = run_study(options.file, out, **options.model_dump(exclude={"file", "out"}), command=command_line())
    show("\n".join([results["question"], *answers(results)]))
    show(f"page  {(out or Path('runs') / 'studies' / results['study']) / 'study.html'}")
    return results
