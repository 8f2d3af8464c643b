"""From the options of a training to `TrainingArguments`."""

import pytest
from transformers import TrainingArguments

from prefdistill.core.errors import UserError
from prefdistill.training.arguments import training_arguments
from prefdistill.training.factory import check_training
from prefdistill.training.options import UNUSED, DPOTraining, Training, argument_problems
from prefdistill.training.trl import check_trl_training


def arguments(out, kind=Training, **options):
    return training_arguments(kind(**options), out, seed=3, data_seed=4)


def test_training_arguments(tmp_path):
    found = arguments(
        tmp_path, batch_size=24, micro_batch_size=8, learning_rate=1e-4, max_steps=7, warmup=3, schedule="linear",
        arguments={"adam_beta2": 0.95, "logging_first_step": True},
    )  # fmt: skip
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == (8, 3)
    assert (found.learning_rate, found.max_steps, found.warmup_steps, found.lr_scheduler_type) == (1e-4, 7, 3, "linear")
    assert (found.seed, found.data_seed, found.report_to) == (3, 4, [])
    assert (found.adam_beta2, found.logging_first_step) == (0.95, True)
    assert list(tmp_path.iterdir()) == []


def test_a_batch_smaller_than_a_micro_batch_is_one_micro_batch(tmp_path):
    found = arguments(tmp_path, batch_size=2, micro_batch_size=4)
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == (2, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 10, "micro_batch_size": 4}, "batch_size=10 is not a multiple of .* = 4 x 1; change one"),
        ({"arguments": {"learning_speed": 1}}, "training arguments: .*unexpected keyword argument 'learning_speed'"),
        ({"arguments": {"train_sampling_strategy": "group_by_length"}}, "group_by_length needs one text per row"),
        ({"report_to": ["nobody"]}, "training arguments: nobody is not supported"),
        ({"report_to": ["comet_ml"]}, "training arguments: .*comet"),
        ({"arguments": {"label_smoothing_factor": 0.1}}, "has no effect: the method has its own loss"),
        ({"arguments": {"optim": "adamx"}}, "training arguments: adamx is not a valid"),
        ({"arguments": {"adam_epsilon": "1"}}, "training arguments: adam_epsilon must be a valid number"),
        ({"arguments": {"save_total_limit": 1.5}}, "training arguments: save_total_limit must be a valid int"),
        ({"arguments": {"adam_beta1": 7}}, "training arguments: Invalid beta parameter at index 0: 7"),
        ({"arguments": {"optim": "adamw_anyprecision"}}, "training arguments: Please install"),
        ({"schedule": "cosine_with_min_lr"}, "training arguments: One of min_lr or min_lr_rate should be set"),
        ({"schedule": "warmup_stable_decay"}, "training arguments: .* missing .*'num_decay_steps'"),
        ({"schedule": "cosne"}, "training arguments: cosne is not a valid"),
    ],
)  # fmt: skip
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(UserError, match=message) as error:
        arguments(tmp_path, **options)
    assert "\n" not in str(error.value)


def test_dpo_arguments_of_trl(tmp_path):
    from trl import DPOConfig

    training = DPOTraining(beta=0.3, batch_size=4, arguments={"loss_type": "ipo"})
    found = training_arguments(training, tmp_path, seed=0, data_seed=0, kind=DPOConfig, beta=training.beta)
    assert isinstance(found, DPOConfig)
    assert (found.beta, found.loss_type) == (0.3, ["ipo"])


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("num_train_epochs", "epochs"),
        ("per_device_train_batch_size", "micro_batch_size"),
        ("gradient_accumulation_steps", "batch_size"),
        ("warmup_steps", "warmup"),
        ("warmup_ratio", "warmup"),
        ("lr_scheduler_type", "schedule"),
        ("learning_rate", "learning_rate"),
        ("max_steps", "max_steps"),
        ("weight_decay", "weight_decay"),
        ("max_grad_norm", "max_grad_norm"),
        ("bf16", "bf16"),
        ("gradient_checkpointing", "gradient_checkpointing"),
        ("logging_steps", "logging_steps"),
        ("save_steps", "save_steps"),
        ("report_to", "report_to"),
        ("seed", "the seed of the recipe or --seed"),
        ("data_seed", "the seed of the recipe or --seed"),
        ("output_dir", "--out"),
        ("max_length", "max_length of the data, or --max-length"),
        ("beta", "beta"),
    ],
)
def test_an_argument_that_an_option_sets_is_refused(name, own):
    with pytest.raises(UserError, match=f"arguments.{name} is set by {own}; leave it out"):
        Training.checked("training", epochs=0.25, arguments={name: 3})


def test_every_value_that_options_give_to_the_trainer_has_one_key(tmp_path, monkeypatch):
    """What `training_arguments` passes from an option cannot be passed in `arguments` too."""
    passed = {}

    def recorder(**options):
        passed.update(options)
        return TrainingArguments(**options)

    recorder.__annotations__ = {}
    monkeypatch.setattr("prefdistill.training.arguments.get_type_hints", lambda kind: {})
    training_arguments(Training(), tmp_path, seed=0, data_seed=0, kind=recorder)
    of_the_machine = {"use_cpu", "disable_tqdm", "dataloader_pin_memory"}
    free = {name for name in passed if not argument_problems([name])}
    assert free == of_the_machine


@pytest.mark.parametrize("name", sorted(UNUSED))
def test_an_argument_without_an_effect_is_refused(name):
    with pytest.raises(UserError, match=f"arguments.{name} has no effect: "):
        Training.checked("training", arguments={name: True})


def test_all_wrong_arguments_are_named_at_once():
    with pytest.raises(UserError, match=r"arguments.seed is set by.*arguments.save_steps is set by.*packing has no"):
        Training.checked("training", arguments={"seed": 1, "save_steps": 3, "packing": True})


def test_an_argument_that_a_method_never_reads_is_refused():
    with pytest.raises(UserError, match=r"arguments.label_smoothing_factor has no effect: the method has its own loss"):
        check_training(Training(arguments={"label_smoothing_factor": 0.1}))


def test_arguments_that_are_used_are_taken(tmp_path):
    check_training(Training(arguments={"adam_beta2": 0.9}))
    check_trl_training(Training(arguments={"label_smoothing_factor": 0.1}))
    check_trl_training(DPOTraining(arguments={"loss_type": "ipo"}))


def test_a_tracker_may_be_written_without_brackets(tmp_path):
    assert Training.checked("training", report_to="tensorboard").report_to == ["tensorboard"]
    assert arguments(tmp_path, report_to="none").report_to == []
    assert arguments(tmp_path, report_to="tensorboard").report_to == ["tensorboard"]
    assert list(tmp_path.iterdir()) == []


class SeveralGPUs(TrainingArguments):
    """As on a machine with four GPUs, on a process that nothing has launched."""

    def __post_init__(self):
        super().__post_init__()
        self._n_gpu = 4


def test_one_process_trains_on_the_first_of_several_gpus(tmp_path, capsys):
    single_gpu_arguments = training_arguments(Training(batch_size=8), tmp_path, seed=0, data_seed=0, kind=SeveralGPUs)
    assert single_gpu_arguments.n_gpu == 1
    assert single_gpu_arguments.train_batch_size == single_gpu_arguments.per_device_train_batch_size
    assert "note: training on the first of 4 GPUs; to use all" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("launched", "bf16", "refused"), [("bf16", False, True), ("bf16", True, False), ("no", True, False)]
)
def test_the_precision_of_the_launcher_is_that_of_the_training(launched, bf16, refused, tmp_path, monkeypatch):
    """accelerate would train in the launcher's."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    if refused:
        with pytest.raises(UserError, match="the launcher sets mixed_precision bf16, and this training has bf16=false"):
            arguments(tmp_path, bf16=bf16)
    else:
        assert arguments(tmp_path, bf16=bf16).bf16 == bf16
