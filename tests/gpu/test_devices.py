"""Numbers of a device against those of the CPU in float32: `pytest -m gpu` on a GPU.

The same tests run on the CPU with `pytest -m slow tests/gpu`, so that they cannot rot where there is no GPU.
"""

import importlib.util
from dataclasses import replace

import pytest
import torch
from benchmarks.parity import Parity
from benchmarks.shapes import SHAPES, compile_layers

from prefdistill.data.batches import PADDED, layout_for
from prefdistill.data.columns import SIDES
from prefdistill.methods import METHODS
from prefdistill.models.load import load_model, ready
from prefdistill.models.logprobs import vocabulary_rows
from prefdistill.models.placement import is_spread
from prefdistill.training.factory import make_trainer
from prefdistill.training.loop import fit
from prefdistill.training.options import Training
from support.interrupt import StopAt

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


def test_layers_on_the_device_and_in_main_memory(device, tmp_path):
    """`device_map` with room for a part of the weights on the device; on the CPU the rest is on disk."""
    parity = Parity(SHAPES[SHAPE_OF[device]] | {"vocab_size": 512})
    parity.teacher.save_pretrained(tmp_path)
    room = 3 * sum(weight.nbytes for weight in parity.teacher.parameters()) // 4
    max_memory = {0: room, "cpu": 2**30} if device == "cuda" else {"cpu": room}
    model = ready(load_model(str(tmp_path), dtype="float32", device_map="auto", max_memory=max_memory))
    assert is_spread(model)
    assert set(model.hf_device_map.values()) == ({0, "cpu"} if device == "cuda" else {"cpu", "disk"})
    gaps = parity.signal_gaps(parity.signals(model))
    assert all(gaps[kind]["max"] < most for kind, most in PRECISE.items()), gaps


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_signals_of_quantised_weights(parity, device, tmp_path):
    """Those of the same 4 bits in float32 on the CPU; values are near those of the weights before, and not equal."""
    parity.teacher.save_pretrained(tmp_path)
    model = ready(load_model(str(tmp_path), dtype="float32", quantization="4bit"))
    assert {weight.device.type for weight in model.parameters()} == {device}
    signals = parity.signals(model)
    expected = parity.signals(model.dequantize().to("cpu", torch.float32))
    for kind, numbers in signals.items():
        assert abs(numbers - expected[kind]).max() < 1e-2
    assert 1e-3 < parity.signal_gaps(signals)["values"]["mean"] < 0.2


def test_a_training_is_saved_verified_and_resumed(parity, device, tmp_path):
    """After Ctrl-C at its second step it has the weights of one without; `fit` compares the saved model's logits."""
    parity.student.save_pretrained(tmp_path / "start")
    training = Training(max_steps=4, batch_size=2, micro_batch_size=1, learning_rate=1e-4, logging_steps=1)

    def train(out, stop_at=None):
        start = lambda: load_model(str(tmp_path / "start"), dtype="float32")  # noqa: E731
        trainer = make_trainer(METHODS["simpo"](), start, parity.data, parity.tokenizer, training, tmp_path / out)
        trainer.add_callback(StopAt(stop_at))
        assert trainer.model.device.type == device
        fit(trainer, tmp_path / out, out)

    train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("stopped", stop_at=2)
    assert [path.name for path in tmp_path.glob("stopped/checkpoints/checkpoint-*")] == ["checkpoint-2"]
    train("stopped")
    start, whole, stopped = (load_model(str(tmp_path / name)).state_dict() for name in ("start", "whole", "stopped"))
    moved, apart = (sum(float((whole[key] - x).square().sum()) for key, x in of.items()) for of in (start, stopped))
    assert apart < 1e-4 * moved  # squares; nothing, where the kernels are deterministic
    assert moved > 0


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
