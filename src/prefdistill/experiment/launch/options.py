"""Which kinds of stages run on several processes, and how these are started."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt

from prefdistill.core.errors import UserError
from prefdistill.core.options import Section, suggestion
from prefdistill.core.yaml import read_yaml

SHARDED = ("FSDP", "DEEPSPEED")
# Kinds of accelerate that a run cannot start, and what to write instead.
REFUSED = {
    "MULTI_CPU": "needs MPI; write {processes: N}, which also starts processes on a CPU",
    "MEGATRON_LM": "is another trainer; use FSDP or DEEPSPEED",
    "XLA": "has not been tried; use `accelerate launch` with single stages",
    "TPU": "has not been tried; use `accelerate launch` with single stages",
}


class Processes(Section):
    """Processes on this machine that hold a copy of the model each: `{processes: 2}`."""

    processes: PositiveInt = Field(description="How many: one for each accelerator, or sharing the cores of a CPU.")


class Launch(Section):
    """How the processes of a kind of stage are started: a configuration file of accelerate, or `{processes: 2}`."""

    sft: str | Processes | None = Field(None, description="SFT of the teacher and of the student's start.")
    dpo: str | Processes | None = Field(None, description="DPO of the teacher.")
    distill: str | Processes | None = Field(None, description="Training of the students.")
    signals: str | Processes | None = Field(None, description="Signals of teacher and reference; no sharded models.")


@dataclass(frozen=True)
class Launcher:
    """What a kind of stage is launched with.

    Args:
        name: for messages and plans: the file, or the number of processes.
        config: a configuration of accelerate, checked.
    """

    name: str
    config: dict[str, Any]

    @property
    def processes(self) -> int:
        return int(self.config["num_processes"])

    @property
    def sharded(self) -> bool:
        return self.config["distributed_type"] in SHARDED

    def __str__(self) -> str:
        count = f"{self.processes} process{'es' if self.processes > 1 else ''}"
        return self.name if self.name == count else f"{self.name} ({count})"


def launcher_of(launch: Launch, kind: str) -> Launcher | None:
    """Return the launcher of a kind of stage; None if the run itself does its work.

    Raises:
        UserError: if the configuration of accelerate is missing, not valid, or of processes that a run cannot start.
    """
    value: str | Processes | None = getattr(launch, kind, None)
    if value is None:
        return None
    if isinstance(value, Processes):
        count = value.processes
        return Launcher(
            f"{count} process{'es' if count > 1 else ''}",
            {
                "compute_environment": "LOCAL_MACHINE",
                "distributed_type": "MULTI_GPU" if count > 1 else "NO",  # the same for any accelerator, and for a CPU
                "num_processes": count,
                "num_machines": 1,
                "mixed_precision": "no",
            },
        )
    where = f"launch.{kind}"
    config = read_yaml(
        Path(value),
        "configuration of accelerate",
        f"name a file for {where}, or write {{processes: 2}}",
        "distributed_type, num_processes",
    )
    if messages := _problems(config, sharded=kind != "signals"):
        raise UserError(*messages, where=f"{where}: {value}")
    return Launcher(value, config)


def _problems(config: dict[str, Any], *, sharded: bool) -> list[str]:
    """What is wrong with a configuration of accelerate, which itself ignores unknown keys inside its sections."""
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils import is_deepspeed_available

    kind, environment = config.get("distributed_type"), config.get("compute_environment", "LOCAL_MACHINE")
    if environment != "LOCAL_MACHINE":
        return [f"compute_environment {environment} is not supported; a run starts processes on its own machine"]
    known = {field.name for field in fields(ClusterConfig)}
    messages = [f"unknown key {key!r}; {suggestion(key, sorted(known))}" for key in config if key not in known]
    arguments = vars(launch_command_parser().parse_args(["script"]))
    for section in ("fsdp_config", "deepspeed_config", "dynamo_config"):
        prefix = {"fsdp_config": "fsdp_", "dynamo_config": "dynamo_"}.get(section, "")
        names = {key: key if key.startswith(prefix) else prefix + key for key in config.get(section) or {}}
        options = sorted(name for name in arguments if name.startswith(prefix or "deepspeed"))
        messages += [
            f"unknown key '{section}.{key}'; {suggestion(name, options)}"
            for key, name in names.items()
            if name not in arguments
        ]
    if kind in REFUSED:
        messages.append(f"distributed_type {kind} {REFUSED[kind]}")
    elif kind not in ("NO", *SHARDED) and not str(kind).startswith("MULTI_"):
        messages.append(f"distributed_type must be NO, MULTI_GPU, FSDP or DEEPSPEED, got {kind!r}")
    if kind in SHARDED and not sharded:
        messages.append(
            f"distributed_type {kind} shards trainings; each process of signals holds the whole model: {{processes: N}}"
        )
    if kind == "DEEPSPEED" and not is_deepspeed_available():
        messages.append("distributed_type DEEPSPEED needs the package deepspeed")
    count = config.get("num_processes")
    if type(count) is not int or count < 1:
        messages.append(f"num_processes must be a positive number, got {count!r}")
    if config.get("num_machines", 1) != 1:
        messages.append(
            f"num_machines is {config['num_machines']}: a run starts processes on its own machine; for several, start "
            "the stage itself with `accelerate launch` on each"
        )
    return messages
