"""From the options of a training to `TrainingArguments`."""

import pytest

from prefdistill.core.errors import UserError
from prefdistill.training.arguments import training_arguments
from prefdistill.training.options import DPOTraining, Training


def arguments(out, kind=Training, **options):
    return training_arguments(kind(**options), out, seed=3, data_seed=4)


def test_training_arguments(tmp_path):
    found = arguments(
        tmp_path, batch_size=24, micro_batch_size=8, learning_rate=1e-4, max_steps=7, warmup=3, schedule="linear",
        arguments={"adam_beta2": 0.95, "logging_steps": 2},
    )  # fmt: skip
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == (8, 3)
    assert (found.learning_rate, found.max_steps, found.warmup_steps, found.lr_scheduler_type) == (1e-4, 7, 3, "linear")
    assert (found.seed, found.data_seed, found.report_to) == (3, 4, [])
    assert (found.adam_beta2, found.logging_steps) == (0.95, 2)  # `arguments` has the last word
    assert list(tmp_path.iterdir()) == []


def test_a_batch_smaller_than_a_micro_batch_is_one_micro_batch(tmp_path):
    found = arguments(tmp_path, batch_size=2, micro_batch_size=4)
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == (2, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 10, "micro_batch_size": 4}, "batch_size=10 is not a multiple of .* = 4 x 1; change one"),
        ({"arguments": {"learning_speed": 1}}, "training arguments: .*unexpected keyword argument 'learning_speed'"),
        ({"arguments": {"output_dir": "x"}}, "training arguments: .*output_dir"),
        ({"arguments": {"optim": "adamx"}}, "training arguments: adamx is not a valid"),
        ({"arguments": {"max_grad_norm": "1"}}, "training arguments: max_grad_norm must be a valid number"),
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
