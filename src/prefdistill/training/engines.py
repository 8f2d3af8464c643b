"""The engine of a training on several processes: DDP, FSDP2 or DeepSpeed, as the launcher or the arguments ask for."""

import os
from typing import Any

import torch
from accelerate.utils import AutocastKwargs, DistributedType, FullyShardedDataParallelPlugin, fsdp2_prepare_model
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from prefdistill.core.errors import UserError
from prefdistill.core.progress import say_once

DDP, FSDP2 = "ddp", "fsdp2"


def asks_for_fsdp(arguments: Any) -> bool:
    """Return whether the launcher's configuration or `TrainingArguments` ask for FSDP."""
    return _is_set("ACCELERATE_USE_FSDP") or arguments.fsdp_plugin_args is not None


def launched_deepspeed() -> bool:
    """Return whether the launcher's configuration asks for DeepSpeed."""
    return _is_set("ACCELERATE_USE_DEEPSPEED")


def device_arguments(accelerator: bool, bf16: bool) -> dict[str, Any]:
    """Return the `TrainingArguments` that say where to train: on the accelerator, or on the CPU without one."""
    if launched_deepspeed() and not accelerator:
        # with use_cpu accelerate leaves DeepSpeed out, and without it transformers refuses bf16, which DeepSpeed knows
        return {"use_cpu": False, "ddp_backend": "gloo", "bf16": False}
    return {"use_cpu": not accelerator, "bf16": bf16}


def check_engine(arguments: Any) -> None:
    """Check before anything is loaded that the engine that `TrainingArguments` or the launcher ask for can be used.

    Raises:
        UserError: for FSDP1, for weights that only the first process would load, and for ZeRO-3 that saves no weights.
    """
    if arguments.deepspeed_plugin is not None:
        zero = arguments.deepspeed_plugin.hf_ds_config.config["zero_optimization"]
        if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
            raise UserError("ZeRO-3 saves no model without stage3_gather_16bit_weights_on_model_save: true; set it")
        if not arguments.use_cpu and not torch.accelerator.is_available() and not launched_deepspeed():
            raise UserError("arguments.deepspeed needs an accelerator; on CPUs launch it with ACCELERATE_USE_DEEPSPEED")
    if not asks_for_fsdp(arguments):
        return
    options = arguments.fsdp_plugin_args or {}
    version = options.get("fsdp_version", os.environ.get("FSDP_VERSION", "1"))
    if int(version) != 2:
        raise UserError("FSDP1 is asked for; set fsdp_version: 2 in the configuration (or FSDP_VERSION=2)")
    if options.get("cpu_ram_efficient_loading") or _is_set("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise UserError(
            "with fsdp_cpu_ram_efficient_loading the first process alone has the weights of the student's start, and "
            "every process reads it before it is sharded; set fsdp_cpu_ram_efficient_loading: false"
        )


def check_trainable(model: Any, arguments: Any) -> None:
    """Check that the engine can shard a model.

    Raises:
        UserError: if its weights are quantised, or FSDP2 would train them in another dtype.
    """
    fsdp = asks_for_fsdp(arguments)
    if arguments.world_size == 1 or not (fsdp or arguments.deepspeed_plugin is not None):
        return
    if getattr(model, "is_quantized", False):
        raise UserError("quantised weights are not sharded; train them under DDP, or load the student in float32")
    if fsdp and arguments.bf16 and model.dtype != torch.float32:
        raise UserError(
            f"under FSDP2 accelerate makes float32 of weights in {str(model.dtype).removeprefix('torch.')} if bf16 is "
            "true; set dtype to float32 (model.dtype in a recipe), or bf16=false"
        )


def load_whole_models() -> None:
    """Have transformers load whole models: while ZeRO-3 is set up, it would partition each one that it loads."""
    unset_hf_deepspeed_config()


def engine_of(trainer: Trainer) -> str:
    """Return "ddp" (also for one process), "fsdp2", or "zero" and its stage."""
    if trainer.is_deepspeed_enabled:
        return f"zero{trainer.accelerator.state.deepspeed_plugin.zero_stage}"
    return FSDP2 if trainer.is_fsdp_enabled else DDP


class ShardingTrainer(Trainer):
    """A Trainer that shards under FSDP2 on CPUs as well, and computes with the same numbers as under DDP.

    On CPUs accelerate ignores that FSDP is asked for and uses DDP. Its own path for FSDP2 runs there all the same, with
    gloo. bf16 is autocast, as on one process, and not a copy of the weights in 16 bits: that would round the residual
    stream, and under DeepSpeed what is saved.
    """

    def create_accelerator_and_postprocess(self) -> None:
        if asks_for_fsdp(self.args):  # gradients of several micro-batches would be added up whole, on every process
            config: Any = self.args.accelerator_config
            config.gradient_accumulation_kwargs = {
                "sync_each_batch": True,
                **(config.gradient_accumulation_kwargs or {}),
            }
        bf16 = self.args.bf16
        if launched_deepspeed():  # its configuration must say the same, and on CPUs the arguments are made without bf16
            self.args.bf16 = self.args.mixed_precision == "bf16"
        super().create_accelerator_and_postprocess()
        self.args.bf16 = bf16
        state = self.accelerator.state
        if self.is_deepspeed_enabled:
            config = state.deepspeed_plugin.deepspeed_config
            config["bf16"] = {"enabled": False}
            config["torch_autocast"] = {"enabled": bool(self.args.bf16), "dtype": "bfloat16"}
        if not asks_for_fsdp(self.args):
            return
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**(self.args.fsdp_plugin_args or {}))
            state.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True
            self._note("accelerate uses DDP on CPUs where FSDP is asked for; here the weights are sharded by FSDP2")
        if self.is_fsdp_enabled:
            _set_plugin(state.fsdp_plugin)
            # the cache would keep a copy in 16 bits of every weight that is gathered, until the pass ends
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        else:
            self._note("FSDP is asked for, and there is one process: nothing is sharded")

    def _note(self, text: str) -> None:
        if self.accelerator.is_main_process:
            say_once(f"note: {text}")


def with_sharding(trainer_class: type[Any]) -> type[Any]:
    """Return a subclass of one of TRL's trainers that shards as `ShardingTrainer` does."""

    class Sharding(trainer_class, ShardingTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._reference = kwargs.get("ref_model")
            super().__init__(*args, **kwargs)

        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            if self.is_fsdp_enabled and self._reference is not None:  # TRL would gather all of its weights at once
                fsdp2_prepare_model(self.accelerator, self._reference)

        def compute_loss_context_manager(self) -> Any:
            stack = super().compute_loss_context_manager()
            if self.is_fsdp_enabled:  # accelerate's autocast is on the forward of the other engines' models
                stack.enter_context(self.accelerator.autocast())
            return stack

    Sharding.__name__ = Sharding.__qualname__ = trainer_class.__name__
    return Sharding


def _set_plugin(plugin: FullyShardedDataParallelPlugin) -> None:
    """Set what every training under FSDP2 has in common."""
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    plugin.state_dict_config = plugin.optim_state_dict_config = None  # of the other type, where one was set
    plugin.set_state_dict_type("SHARDED_STATE_DICT")  # any number of processes resumes from it
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    if plugin.auto_wrap_policy is None:
        plugin.auto_wrap_policy = transformer_auto_wrap_policy  # without it all weights are gathered at once


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true")
