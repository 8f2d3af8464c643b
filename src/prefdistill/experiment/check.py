"""Check a plan before anything is written: data, names of models, training arguments, what methods need."""

import reprlib
from typing import TYPE_CHECKING

import numpy as np
import torch

from prefdistill.core.errors import UserError
from prefdistill.core.progress import say, say_once
from prefdistill.core.workers import check_ray
from prefdistill.data.columns import SCORES, SIDES
from prefdistill.data.numbers import numeric_column
from prefdistill.data.prompts import prompt_of, prompt_text, prompts_of
from prefdistill.data.synthetic import build_tokenizer
from prefdistill.evaluation.options import RewardModelOptions
from prefdistill.evaluation.reward_model import check_prompts
from prefdistill.experiment.inputs import Sources
from prefdistill.experiment.launch.options import Launch, launcher_of
from prefdistill.experiment.needs import of_own_tokens, reference_bf16
from prefdistill.experiment.plan import Plan
from prefdistill.experiment.recipe import Recipe
from prefdistill.experiment.steps.signals import Sample
from prefdistill.experiment.user_data import UserData
from prefdistill.methods import Method, sampled
from prefdistill.models.adapters import check_start
from prefdistill.models.classifiers import empty_classifier
from prefdistill.models.load import check_reward_model
from prefdistill.models.pruned import empty_pruned
from prefdistill.models.scratch import check_shape
from prefdistill.models.token_map import token_bytes
from prefdistill.sampling import ENGINES
from prefdistill.sampling.options import SampleRequest
from prefdistill.signals.join import ACROSS, INSTEAD, ONE_VOCABULARY
from prefdistill.training.arguments import split_batch

if TYPE_CHECKING:
    from datasets import Dataset

FEW_PROMPTS = 500


def check_plan(plan: Plan) -> None:
    """Check everything that can be wrong with a recipe besides the weights of its models.

    Raises:
        UserError: on the first error.
    """
    recipe = plan.context.recipe
    if plan.user_data is not None:
        _check_data(plan.user_data, recipe)
    _check_tokenizers(plan)
    _ = plan.context.truncation
    _check_engines(plan)
    if recipe.model.scratch:
        check_shape(recipe.model.scratch.teacher)
        check_shape(recipe.model.scratch.student)
    if section := recipe.reward_model:
        _check_reward_model(plan, section)
    check_trainings(plan)
    check_launch(recipe)
    if warning := seen_by_the_start(plan):
        say_once(f"warning: {warning}")
    for name, method in plan.methods.items():
        _check_method(plan, f"methods.{name}", method)
    if len(reference_bf16(recipe, plan.methods)) > 1:
        raise UserError("training.bf16 differs between methods, but they share one reference, which is read once")
    for name, run in recipe.methods.items():
        if run.rounds > 1 and "student_response" not in plan.methods[name].responses:
            raise UserError(f"methods.{name}.rounds: {run.method} does not learn from the student's own responses")


def seen_by_the_start(plan: Plan) -> str:
    """Return a warning where SFT shows a named student the chosen responses of few prompts, on which DPO then trains.

    DPO then learns to tell the responses that the start has seen from those that it has not.
    """
    recipe, data = plan.context.recipe, plan.user_data
    if recipe.model.student is None or recipe.student.sft is None or recipe.data.sft is not None or data is None:
        return ""
    prompts = len({prompt_text(prompt) for prompt in prompts_of(data.train)})
    if prompts >= FEW_PROMPTS:
        return ""
    return (
        f"student.sft learns the chosen responses of the {prompts} prompts that the methods train on. With so few, a "
        "student may learn which responses it has seen, and order other pairs worse than chance: name other "
        "demonstrations (data.sft), use more prompts, or read the accuracy on held-out pairs"
    )


def _check_tokenizers(plan: Plan) -> None:
    """Check that the tokenizers can be loaded, and have a chat template if the data are conversations."""
    context, data = plan.context, plan.user_data
    conversational = data is None or isinstance(data.train[0]["prompt"], list)
    used = {step.reads_with for step in plan.steps}
    for tokenizer, key in ((context.tokenizer, "chat_template"), (context.teacher_tokenizer, "teacher_chat_template")):
        if tokenizer.made_by is None and not tokenizer.tokenizer.chat_template and conversational and tokenizer in used:
            raise UserError(
                f"the data are conversations, but {tokenizer.tokenizer.name_or_path} has no chat template; name one as "
                f"model.{key}: a file, or plain"
            )


def _check_reward_model(plan: Plan, section: RewardModelOptions) -> None:
    recipe = plan.context.recipe
    trust = recipe.model.trust_remote_code
    if section.start:
        empty_classifier(section.start, trust_remote_code=trust)
    elif section.name:
        check_reward_model(section.name, trust_remote_code=trust)
    else:
        check_shape(section.shape, {"num_labels": 1})
    if section.source and plan.reward_model:
        check_prompts(
            section.source,
            plan.reward_model.test.rows,
            str(recipe.data.test),
            plan.context.chat_templates,
            limit=recipe.evaluate.prompts,
            trust_remote_code=trust,
        )


def check_trainings(plan: Plan) -> None:
    """Check the arguments of every training; this needs neither data nor models."""
    from trl import RewardConfig

    from prefdistill.training.arguments import training_arguments
    from prefdistill.training.factory import check_training
    from prefdistill.training.trl import check_trl_training

    recipe = plan.context.recipe
    for run in recipe.methods.values():
        check_training(run.training)
    for training in filter(None, (recipe.teacher.sft, recipe.student.sft, recipe.teacher.dpo)):
        check_trl_training(training)
    if recipe.reward_model and not recipe.reward_model.name:
        training_arguments(recipe.reward_model.training, plan.context.root, seed=0, data_seed=0, kind=RewardConfig)


def check_launch(recipe: Recipe) -> None:
    """Check what starts the processes of a recipe's stages, and that their trainings fit it.

    Raises:
        UserError: if a configuration is not valid, there are fewer accelerators than processes, a batch cannot be split
            between them, or the configuration sets another precision than a training.
    """
    for kind in Launch.model_fields:
        launcher = launcher_of(recipe.launch, kind)
        if launcher is None:
            continue
        if kind == "signals" and recipe.signals.engine == "ray":
            raise UserError(
                "signals.engine=ray and launch.signals each start the processes that extract signals: leave one out"
            )
        if kind == "signals" and recipe.signals.device_map:
            raise UserError(
                f"signals.device_map={recipe.signals.device_map} spreads the teacher over the devices of one process: "
                "leave it out, or launch.signals"
            )
        devices = torch.accelerator.device_count()
        if 0 < devices < launcher.processes:
            raise UserError(f"launch.{kind}: {launcher} on a machine with {devices} accelerators; each needs its own")
        precision = launcher.config.get("mixed_precision") or "no"
        for key, _, training in recipe.trainings():
            of_method = key.startswith("methods.")
            if not (of_method if kind == "distill" else key in (f"teacher.{kind}", f"student.{kind}")):
                continue
            try:
                split_batch(training, launcher.processes)
            except UserError as error:
                raise UserError(f"{key}: {error} (launch.{kind}: {launcher})") from error
            if precision != "no" and precision != ("bf16" if training.autocast else "no"):
                raise UserError(
                    f"launch.{kind}: {launcher} sets mixed_precision {precision}, and {key} trains with "
                    f"bf16={str(training.autocast).lower()}; set training.bf16, or mixed_precision to 'no'"
                )


def check_models(recipe: Recipe, sources: Sources, *, fetch: bool = True) -> None:
    """Check that the models that the recipe names can be loaded; with `fetch`, this downloads those of the Hub."""
    names = recipe.model
    for name in filter(None, map(names.name_of, ("teacher", "teacher_reference", "student"))):
        sources.check_model(name, trust_remote_code=names.trust_remote_code, fetch=fetch)
    if names.student_layers is not None:
        empty_pruned(str(names.name_of("student")), names.student_layers, trust_remote_code=names.trust_remote_code)
    trained = {names.name_of("student"), names.teacher if recipe.teacher.sft or recipe.teacher.dpo else None}
    for name in filter(None, trained):
        check_start(name, names.dtype)


def _check_data(data: UserData, recipe: Recipe) -> None:
    _ = data.train
    if recipe.data.test is not None:
        _ = data.test
    elif recipe.reward_model:
        say("note: without data.test there are no responses to score: reward_model is not used")


def _check_engines(plan: Plan) -> None:
    recipe = plan.context.recipe
    if recipe.signals.engine == "ray":
        check_ray()
    columns = {response for method in plan.methods.values() for response in sampled(method)}
    for step in plan.steps:
        if isinstance(step, Sample):
            ENGINES.find(recipe.sampling.engine).check(
                step.model.place, SampleRequest.checked("sampling", **step.sampling_options)
            )
    if plan.user_data and (ignored := sorted(columns.intersection(plan.user_data.train.column_names))):
        say(f"note: the data's own {', '.join(ignored)} is not used; a recipe samples what its methods learn from")


def _check_method(plan: Plan, where: str, method: Method) -> None:
    """Check that this recipe makes the signals that a method needs."""
    recipe = plan.context.recipe
    _check_tokens(plan, where, method)
    if method.weakness:
        say_once(f"warning: {where}: {method.weakness}")
    for need in method.needs:
        for name, value in need.settings.items():
            if (actual := getattr(recipe.signals, name)) != value:
                raise UserError(f"{where} needs signals.{name}={value}, but it is {actual}; change one of them")
        if need.role == "teacher_reference" and recipe.teacher.dpo is None and recipe.model.teacher_reference is None:
            raise UserError(
                f"{where} needs the model the teacher's DPO started from: name it as model.teacher_reference, or "
                "let the recipe do teacher.dpo"
            )
        if need.role == "data" and plan.user_data is not None:
            _check_numbers(where, method, need.kind, plan.user_data)
        elif need.role == "data" and need.kind not in SCORES:
            raise UserError(f"{where} needs a column {need.kind!r} of the data; the built-in task has none")
        if recipe.sampling.n > 1 and sampled(method) and not set(SIDES).isdisjoint(need.responses):
            raise UserError(f"{where} needs signals of the pairs beside samples: sampling.n must be 1 for it")


AS_STUDENT = (
    f"set {ACROSS}, which is exact over one vocabulary, or leave model.teacher_tokenizer and the keys of the teacher's "
    "form out"
)


def _check_tokens(plan: Plan, where: str, method: Method) -> None:
    """Refuse a method on numbers of the teacher's tokens where the student reads the texts in other ones, and tokens
    that cannot be mapped to the student's where a method asks for that."""
    if not plan.context.two_tokenizers:
        return
    names = plan.context.recipe.model
    for need in of_own_tokens(method):
        teacher = names.teacher_tokenizer or names.teacher or "the teacher"
        other = "other tokens" if plan.context.two_vocabularies else "another chat template"
        raise UserError(
            f"{where} needs {need}, but {teacher} has {other} than the student, and {ONE_VOCABULARY}: "
            + (INSTEAD if plan.context.two_vocabularies else AS_STUDENT)
        )
    maps_tokens = plan.context.two_vocabularies and any(need.across for need in method.needs)
    for tokenizer in (plan.context.teacher_tokenizer, plan.context.tokenizer) if maps_tokens else ():
        if tokenizer.made_by is None:
            token_bytes(tokenizer.tokenizer)
        elif plan.context.recipe.data.synthetic:  # else it will be trained, and is byte-level
            token_bytes(build_tokenizer())


def _check_numbers(where: str, method: Method, column: str, data: UserData) -> None:
    """Check that a column has a number for every pair: of the training data, and of the test data where it has it."""
    if column not in data.train.column_names:
        raise UserError(f"{where} needs a column {column!r}, a number for every pair; the data has none")
    parts: list[tuple[str, Dataset]] = [("train", data.train)]
    parts += [("test", data.test)] if data.recipe.data.test is not None else []
    for part, pairs in parts:
        if column not in pairs.column_names:
            continue
        numbers = numeric_column(pairs, column)
        missing = np.flatnonzero(~np.isfinite(numbers))
        if len(missing):
            prompt = prompt_text(prompt_of(pairs[int(missing[0])]))
            raise UserError(
                f"{where} needs a number in {column!r} for every pair; {len(missing)} of data.{part} have none, "
                f"the first of them with the prompt {reprlib.repr(prompt)}; add it, or leave these pairs out"
            )
        method.check_column(column, numbers)
