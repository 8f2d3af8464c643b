"""Devices that a plan is made for, and the options of a plan at scale."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from prefdistill.core.options import NOT_IN_KEY, Section


@dataclass(frozen=True)
class GPU:
    """A device as its maker specifies it.

    Args:
        flops: per second in bfloat16 with float32 sums, dense.
        memory: bytes.
        bandwidth: bytes per second.
    """

    flops: float
    memory: float
    bandwidth: float


# In TFLOP/s, GB (10^9 bytes) and GB/s.
_SPECIFIED = {
    "B200": (2250, 180, 7700),
    "H200": (989, 141, 4800),
    "H100": (989, 80, 3350),
    "H100-PCIe": (756, 80, 2000),
    "H100-NVL": (835, 94, 3900),
    "A100": (312, 80, 2039),
    "A100-40GB": (312, 40, 1555),
    "MI300X": (1307, 192, 5300),
    "L40S": (362, 48, 864),
    "L4": (121, 24, 300),
    "A10": (125, 24, 600),
    "5090": (209, 32, 1792),
    "4090": (165, 24, 1008),
    "3090": (71, 24, 936),
}
GPUS = {name: GPU(tera * 1e12, giga * 1e9, rate * 1e9) for name, (tera, giga, rate) in _SPECIFIED.items()}
GPUName = Literal[
    "B200", "H200", "H100", "H100-PCIe", "H100-NVL", "A100", "A100-40GB", "MI300X", "L40S", "L4", "A10", "5090", "4090",
    "3090",
]  # fmt: skip


class Scale(Section):
    """For what a plan is made: data of a size, and devices. Any of them adds memory by part, operations and hours."""

    pairs: Annotated[PositiveFloat | None, NOT_IN_KEY] = Field(
        None, description="Plan for so many pairs (1e6), without the data, the tokenizers or what is on disk."
    )
    tokens_per_pair: Annotated[PositiveInt, NOT_IN_KEY] = Field(
        600, description="With --pairs: tokens of a prompt and its two responses, a third each."
    )
    gpu: Annotated[GPUName | None, NOT_IN_KEY] = Field(None, description="Plan for this device; default: H100.")
    devices: Annotated[PositiveInt | None, NOT_IN_KEY] = Field(None, description="How many of them; default: 1.")
    strategy: Annotated[Literal["ddp", "zero2", "zero3", "fsdp2"] | None, NOT_IN_KEY] = Field(
        None, description="How several devices share a trained model. Default: fsdp2."
    )
    utilisation: Annotated[float | None, NOT_IN_KEY] = Field(
        None, gt=0, le=1, description="Share of a device's operations per second that work reaches; default: 0.4."
    )

    @property
    def is_set(self) -> bool:
        """Whether any of these options is set."""
        return self != Scale()
