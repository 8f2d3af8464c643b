"""Numbers of a device against those of the CPU in float32: `pytest -m gpu` on a GPU.

The same tests run on the CPU with `pytest -m slow tests/gpu`, so that they cannot rot where there is no GPU.
"""

from dataclasses import replace

import pytest
import torch
from benchmarks.parity import Parity
from benchmarks.shapes import SHAPES, compile_layers

from prefdistill.data.batches import PADDED, layout_for
from prefdistill.data.columns import SIDES
from prefdistill.models.logprobs import vocabulary_rows

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])
SHAPE_OF = {"cuda": "tiny", "cpu": "nano"}
PRECISE = {"values": 1e-3, "token_logps": 1e-3}  # nats, largest
IN_16_BITS = {"values": 0.05, "token_logps": 0.1}  # nats, mean


@pytest.fixture(scope="module", params=[GPU, pytest.param("cpu", marks=pytest.mark.slow)])
def device(request):
    return request.param


@pytest.fixture(scope="module")
def parity(device):
    return Parity(SHAPES[SHAPE_OF[device]])


def test_signals_in_float32(parity, device):
    gaps = parity.signal_gaps(parity.signals(parity.on(device, parity.teacher)))
    assert {kind: gaps[kind]["max"] < most for kind, most in PRECISE.items()} == dict.fromkeys(PRECISE, True), gaps


def test_signals_in_bfloat16(parity, device):
    """Signals are rounded, so not equal, and as far off as 8 bits of precision allow."""
    gaps = parity.signal_gaps(parity.signals(parity.on(device, parity.teacher, "bfloat16")))
    for kind, most in IN_16_BITS.items():
        assert 1e-4 < gaps[kind]["mean"] < most, gaps


@pytest.mark.parametrize(("bf16", "least", "most"), [(False, 0.0, 1e-3), (True, 1e-4, 0.1)])
def test_training_step(parity, device, bf16, least, most):
    """The gradient is compared by the norm of the difference, relative to its own."""
    gaps = parity.step_gaps(parity.step(parity.on(device, parity.student), bf16=bf16))
    assert least <= gaps["gradient"] < most, gaps
    assert gaps["loss"] < most, gaps


def test_tiles_change_neither_loss_nor_gradient(parity, device):
    """Of 7 states each, of which some are computed once more in backward where they are not stored."""
    gaps = parity.step_gaps(parity.step(parity.on(device, parity.student), tile=7))
    assert gaps["loss"] < 1e-4, gaps
    assert gaps["gradient"] < 1e-3, gaps


@pytest.mark.parametrize(("kernel", "kind"), [("sdpa", "masked"), ("flash_attention_2", "packed")])
def test_layouts_of_each_attention_kernel(parity, device, kernel, kind):
    """Rows that share prompts, or that are packed end to end, give what padded rows do, within bfloat16's rounding."""
    try:
        model = parity.on(device, parity.teacher, "bfloat16", kernel)
    except ImportError as error:
        pytest.skip(str(error).splitlines()[0])
    layout = layout_for(model, parity.truncation.max_length)
    assert layout.kind == kind
    layout = replace(layout, attention_cost=0.0)  # share every prompt
    chosen, padded = parity.signals(model, layout), parity.signals(model, PADDED)
    expected = parity.signal_gaps(padded)
    for name, most in IN_16_BITS.items():
        assert abs(chosen[name] - padded[name]).mean() < most
        assert parity.signal_gaps(chosen)[name]["mean"] < 2 * expected[name]["mean"]


def test_compiled_layers(parity, device):
    """On the CPU they are only traced: a C++ compiler would take minutes."""
    backend = "inductor" if device == "cuda" else "eager"
    teacher, student = (parity.on(device, model) for model in (parity.teacher, parity.student))
    for model in (teacher, student):
        compile_layers(model, backend)
    signals = parity.signal_gaps(parity.signals(teacher))
    step = parity.step_gaps(parity.step(student))
    assert all(gap["max"] < 1e-3 for gap in signals.values()), signals
    assert step["gradient"] < 1e-3, step


@pytest.mark.gpu
@NO_CUDA
def test_a_pass_of_values_holds_no_full_logits():
    parity = Parity(SHAPES["tiny"] | {"vocab_size": 128_256}, pairs=16, max_length=1024)
    model = parity.on("cuda", parity.teacher)
    states = sum(len(ids) for side in SIDES for ids in parity.rows[f"{side}_ids"])
    torch.cuda.reset_peak_memory_stats()
    loaded = torch.cuda.memory_allocated()
    parity.signals(model)
    assert torch.cuda.max_memory_allocated() - loaded < states * vocabulary_rows(model) * 4 / 2
