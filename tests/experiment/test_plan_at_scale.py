"""A plan at scale against numbers by hand, and what it counts against what PyTorch counts and a pass saves."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from benchmarks.inputs import make_tokenizer
from datasets import Dataset
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2MoeConfig

from prefdistill.cli import main
from prefdistill.core.errors import UserError
from prefdistill.core.progress import Progress
from prefdistill.data.batches import Layout
from prefdistill.data.columns import SIDES
from prefdistill.data.encode import encode_pairs
from prefdistill.data.truncation import Truncation
from prefdistill.experiment import memory
from prefdistill.experiment.activations import Held, activation_bytes, pass_bytes
from prefdistill.experiment.cost import costs
from prefdistill.experiment.flops import Lengths, Text, forward_flops, training_flops
from prefdistill.experiment.hardware import GPU, GPUS, Scale
from prefdistill.experiment.memory import Memory, reading_memory, sampling_memory, training_memory, weight_bytes
from prefdistill.experiment.plan import build_plan
from prefdistill.experiment.recipe import load_recipe
from prefdistill.experiment.scale import USABLE, fewest
from prefdistill.experiment.show_plan import _length, as_text, plan_recipe
from prefdistill.experiment.steps.models import Dpo
from prefdistill.models import logprobs
from prefdistill.models.backbone import backbone_of
from prefdistill.sampling.engines import TransformersEngine
from prefdistill.sampling.options import Sampling
from prefdistill.signals.scoring import score_pairs
from prefdistill.training.arguments import adapter_config
from prefdistill.training.options import Training
from support.tiny_runs import QUICKSTART, ROOT

COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
BIG = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
SMALL = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
# By hand, from these shapes. A layer's matrices: queries and output h*h each, keys and values h*1024 each, three of the
# MLP h*f each.
BIG_LAYERS = 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
SMALL_LAYERS = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
BIG_WEIGHTS, SMALL_WEIGHTS = 70_553_706_496, 8_030_261_248  # as published for Llama 3.1 70B and 8B
TRAINED = ["teacher.sft=null", "teacher.dpo=null", "student.sft=null", "model.chat_template=null"]
LLAMA = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}

GPT2 = GPT2Config(n_embd=64, n_layer=3, n_head=4, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0)


def meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two directories with a config.json and nothing else."""
    root = tmp_path_factory.mktemp("models")
    for name, shape in (("70b", BIG), ("8b", SMALL)):
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(COMMON | shape))
    return [f"model.teacher={root / '70b'}", f"model.student={root / '8b'}"]


def planned(models, *changes, **scale):
    recipe = load_recipe(ROOT / "recipes" / "papers" / "tvkd.yaml", [*models, *TRAINED, *changes])
    return plan_recipe(recipe, ROOT / "nowhere", Scale(**scale))


@pytest.mark.parametrize("pairs", [1e6, 1e9])
def test_70b_to_8b_by_hand(models, pairs):
    """A pair has 600 tokens: a prompt of 200 and two responses of 200, which share the prompt's pass."""
    plan = planned(models, pairs=pairs, tokens_per_pair=600, gpu="H100", devices=8)["scale"]
    steps = {step["name"]: step for step in plan["steps"]}
    # tokens attend to 200^2/2 pairs in the prompt, and 200*200 + 200^2/2 in and from each response: 140,000
    teacher = pairs * (2 * BIG_LAYERS * 600 + 4 * 80 * 8192 * 140_000 + 2 * 128256 * 8192 * 400)
    assert steps["signals-teacher-train"]["flops"] == pytest.approx(teacher, rel=1e-3)
    # forward, backward twice that, and the layers once more for gradient checkpointing; the head's tiles are stored
    student = pairs * (4 * (2 * SMALL_LAYERS * 600 + 4 * 32 * 4096 * 140_000) + 3 * 2 * 128256 * 4096 * 400)
    for name in ("distill-dpo-0", "distill-tvkd-0"):
        assert steps[name]["flops"] == pytest.approx(student, rel=1e-3)
    assert steps["signals-teacher-train"]["hours"] == pytest.approx(teacher / (8 * 989e12 * 0.4) / 3600, rel=1e-3)
    assert 7.2 < 1e6 / pairs * steps["signals-teacher-train"]["hours"] < 7.4  # hours for a million pairs
    assert 3.0 < 1e6 / pairs * steps["distill-tvkd-0"]["hours"] < 3.2
    # V of 201 states of each response, 4 bytes each, and about 1 byte a token for offsets
    values = steps["signals-teacher-train"]["signals"]["values"]
    assert values == pytest.approx(pairs * 2 * 201 * 4, rel=0.1)

    # memory does not depend on how many pairs there are
    on = steps["distill-tvkd-0"]["memory"]
    assert on["one"]["weights"] == 4 * SMALL_WEIGHTS
    assert on["one"]["gradients"] == 4 * SMALL_WEIGHTS
    assert on["one"]["optimizer"] == 8 * SMALL_WEIGHTS
    assert on["one"]["copies"] == 2 * (SMALL_LAYERS + 128256 * 4096)
    assert on["ddp"]["gradients"] == 8 * SMALL_WEIGHTS
    assert on["zero2"]["optimizer"] == pytest.approx(12 * SMALL_WEIGHTS / 8)
    state = ("weights", "gradients", "optimizer")
    assert sum(on["zero3"][part] for part in state) == pytest.approx(16 * SMALL_WEIGHTS / 8)
    # besides, the gradients of a layer, and of embeddings and head; their weights and those of two layers gathered
    layer, around = SMALL_LAYERS / 32, 2 * 128256 * 4096
    assert sum(on["fsdp2"][part] for part in state) == pytest.approx(
        16 * SMALL_WEIGHTS / 8 + 4 * (layer + around), rel=1e-3
    )
    assert on["fsdp2"]["copies"] == pytest.approx(4 * (2 * layer + around) + 2 * around / 2, rel=1e-3)
    assert on["zero3"]["copies"] == pytest.approx(2 * (2 * layer + around / 2) + 4 * around / 2, rel=1e-3)
    # the inputs of 32 layers for two responses of up to 2048 tokens, and one layer whole
    assert on["one"]["activations"] == pytest.approx(32 * 4096 * 4096 * 4 + 1.3e9, rel=0.1)
    assert steps["signals-teacher-train"]["memory"]["one"]["weights"] == 2 * BIG_WEIGHTS
    assert steps["distill-tvkd-0"]["fits"] == {"one": None, "ddp": None, "zero2": 8, "zero3": 4, "fsdp2": 4}
    assert steps["signals-teacher-train"]["fits"] == {"one": None, "device_map": 4}
    assert steps["signals-reference-train"]["fits"] == {"one": 1}  # what is read as a student is never spread
    # each process of signals holds the whole model
    assert [line.partition(" ")[0] for line in plan["advice"]] == ["signals-teacher-test", "evaluate-teacher"]
    assert steps["signals-teacher-train"]["per_device"] > 2 * BIG_WEIGHTS
    # or its layers are spread over devices, which take turns
    options = {"pairs": pairs, "tokens_per_pair": 600, "gpu": "H100", "devices": 8}
    spread = planned(models, "signals.device_map=auto", **options)["scale"]
    assert not spread["advice"]
    reading = next(step for step in spread["steps"] if step["name"] == "signals-teacher-train")
    assert reading["hours"] == pytest.approx(8 * steps["signals-teacher-train"]["hours"])
    assert reading["per_device"] < 2 * BIG_WEIGHTS / 4


def test_bytes_of_each_kind_by_hand(models):
    """For a million pairs: a number a response, a number a state, or 50 log-probs and ids of 17 bits a state."""
    stored = {}
    for method in ("tvkd", "dckd", "dadpo"):
        recipe = load_recipe(ROOT / "recipes" / "papers" / f"{method}.yaml", [*models, *TRAINED])
        plan = plan_recipe(recipe, ROOT / "nowhere", Scale(pairs=1e6, tokens_per_pair=600))
        step = next(step for step in plan["scale"]["steps"] if step["name"] == "signals-teacher-train")
        stored |= step["signals"]
    assert stored["logps"] == 1e6 * 2 * 4
    assert stored["values"] == pytest.approx(1e6 * 402 * 4, rel=0.1)
    assert stored["topk"] == pytest.approx(1e6 * 400 * 126, rel=0.01)


def test_what_does_not_fit_says_what_to_change(models):
    plan = planned(models, "training.gradient_checkpointing=false", "training.micro_batch_size=2", pairs=1000)
    advice = {line.partition(" ")[0]: line for line in plan["scale"]["advice"]}
    assert "signals.device_map=auto --devices 4, or signals.quantization=4bit" in advice["signals-teacher-test"]
    trained = advice["distill-dpo-0"]
    assert trained.endswith("training.gradient_checkpointing=true training.micro_batch_size=1 training.lora.r=16")
    assert "step" in as_text(plan)
    assert trained in as_text(plan)
    # without what the recipe has already
    plan = planned(models, pairs=1000)
    assert plan["scale"]["advice"][-1].endswith("--devices 4, or training.lora.r=16")
    # and it is true
    steps = planned(models, "training.lora={r: 16}", pairs=1000)["scale"]["steps"]
    adapted = next(step for step in steps if step["name"] == "distill-dpo-0")
    assert adapted["fits"]["one"] == 1
    assert adapted["memory"]["one"]["optimizer"] == 2 * adapted["memory"]["one"]["gradients"] < 1e9


SCRATCH = [
    "model.teacher=null",
    "model.student=null",
    "data.max_length=64",
    f"model.scratch={json.dumps({'teacher': LLAMA, 'student': LLAMA, 'vocab_size': 1000})}",
]


def tiny(monkeypatch, memory, *changes, recipe="base", **scale):
    """The plan at scale of a small recipe for devices with so much memory, in bytes, of which all is usable."""
    monkeypatch.setitem(GPUS, "L4", GPU(1e14, memory / USABLE, 1e12))
    loaded = load_recipe(ROOT / "recipes" / "papers" / f"{recipe}.yaml", [*TRAINED, *SCRATCH, *changes])
    return plan_recipe(loaded, ROOT / "nowhere", Scale(pairs=1000, gpu="L4", **scale))["scale"]


def advice_of(plan):
    return {line.partition(" does")[0].partition(":")[0]: line for line in plan["advice"]}


def test_advice_for_reading_names_options_that_apply_and_is_tried(monkeypatch):
    evaluated = ["evaluate={prompts: 64, batch_size: 64, max_new_tokens: 512}"]
    whole = {step["name"]: sum(step["memory"]["one"].values()) for step in tiny(monkeypatch, 1e9, *evaluated)["steps"]}
    reading = ("signals-reference-test", "evaluate-start", "evaluate-dpo-0")
    room = min(whole[name] for name in reading) - 1
    advice = advice_of(tiny(monkeypatch, room, *evaluated))
    assert {line for line in map(str, advice.values()) if "device_map" in line or "quantization" in line} == set()
    options = {name: advice[name].partition("fit: ")[2].split() for name in reading}
    assert options["signals-reference-test"] == ["signals.batch_tokens=4096"]
    assert options["evaluate-start"] == ["evaluate.batch_size=16"]
    assert options["evaluate-dpo-0"] == ["signals.batch_tokens=4096", "evaluate.batch_size=16"]
    together = {step["name"]: step for step in tiny(monkeypatch, room, *evaluated, *options["evaluate-dpo-0"])["steps"]}
    assert {name: together[name]["fits"]["one"] for name in reading} == dict.fromkeys(reading, 1)  # it is true
    # no option makes the weights of a student smaller while it is read
    assert advice_of(tiny(monkeypatch, 1e5, *evaluated))["evaluate-start"].endswith("fit: take a smaller model")


def test_advice_for_a_teacher_spreads_or_quantises_it_where_that_applies(monkeypatch):
    changes = ["sampling={batch_size: 64, max_new_tokens: 64}"]
    plan = tiny(monkeypatch, 1e9, *changes, recipe="seqkd")
    kinds = {step["name"]: step["fits"] for step in plan["steps"] if "device_map" in step["fits"]}
    assert kinds
    assert all("teacher" in name for name in kinds)
    for change, gone in (
        ("launch.signals={processes: 2}", "signals"),
        ("signals.engine=ray", "signals"),
        ("sampling.engine=vllm", "sample"),
    ):
        steps = tiny(monkeypatch, 1e9, *changes, change, recipe="seqkd")["steps"]
        assert {step["name"] for step in steps if "device_map" in step["fits"]} == {
            name for name in kinds if not name.startswith(gone)
        }


def test_a_reward_model_trains_on_one_device(monkeypatch):
    training = "training: {micro_batch_size: 8, gradient_checkpointing: false}"
    changes = [f"reward_model={{model: {json.dumps(LLAMA)}, {training}}}", "evaluate.prompts=8"]
    plan = tiny(monkeypatch, 1e9, *changes, devices=8)
    step = next(step for step in plan["steps"] if step["kind"] == "reward_model")
    whole = sum(step["memory"]["one"].values())
    assert step["fits"] == {"one": 1}
    assert step["per_device"] == whole
    plan = tiny(monkeypatch, whole - 1, *changes, devices=8)
    line = advice_of(plan)["reward-model"]
    assert line.endswith("fit: reward_model.training.gradient_checkpointing=true")
    line = advice_of(tiny(monkeypatch, 3e5, *changes, devices=8))["reward-model"]
    assert line.endswith("fit: take a smaller model")  # an adapter is refused


def test_counts_of_devices_are_those_that_can_share_a_batch(monkeypatch):
    held = Memory(weights=60, gradients=60, optimizer=120, micro_batches=6)
    training = Training(batch_size=12, micro_batch_size=2)
    for room, count in ((240, 1), (120, 2), (80, 3), (60, 6), (30, None)):
        assert fewest(held, "fsdp2", room / USABLE + 1e-6, training) == count
    advice = tiny(monkeypatch, 1e9, "training.batch_size=48", "training.micro_batch_size=4", devices=8)["advice"]
    assert advice == [
        "distill-dpo-0: batch_size=48 is not a multiple of micro_batch_size x devices = 4 x 8: set "
        "training.batch_size=64, or training.micro_batch_size=3"
    ]
    assert not tiny(monkeypatch, 1e9, "training.batch_size=48", "training.micro_batch_size=3", devices=8)["advice"]
    (line,) = tiny(monkeypatch, 1e9, "training.batch_size=20", "training.micro_batch_size=4", devices=8)["advice"]
    assert line.endswith("set training.batch_size=32")


def test_trl_reads_a_prompt_twice_and_pads_both_responses(tokenizer, pairs):
    """So the longest row of the teacher's DPO is twice the longest prompt with a response."""
    plan = SimpleNamespace(context=SimpleNamespace(truncation=Truncation()))
    length = _length(SimpleNamespace(rows=pairs), plan, tokenizer)
    encoded, _ = encode_pairs(pairs, tokenizer, Truncation())
    texts = [[len(row["prompt_ids"]) + len(row[f"{side}_ids"]) for side in SIDES] for row in encoded]
    assert length.longest_text == max(map(max, texts))
    assert length.longest == max(sum(both) - len(row["prompt_ids"]) for both, row in zip(texts, encoded, strict=True))

    recipe = load_recipe(ROOT / "recipes" / "papers" / "base.yaml", ["model.chat_template=null", *SCRATCH])
    plan = build_plan(recipe, ROOT / "nowhere", 0)
    (dpo,) = (step for step in plan.steps if isinstance(step, Dpo))
    model = meta(LlamaConfig(**LLAMA, vocab_size=1000))
    lengths = {dpo.rows: Lengths(10, 10 * 60, 10 * 20, longest=90, longest_text=70)}
    (cost,) = costs(plan, {"teacher": model}, lengths, steps=[dpo], peak=True).values()
    scored = 60 / 100  # of two prompts of 20 and two responses of 30
    assert cost.held == training_memory(
        model, dpo.training, recipe.model.dtype, 70, scored=scored, sequences=2, reference=True
    )
    one, two = (training_memory(model, Training(), "float32", 70, sequences=n).activations for n in (1, 2))
    assert two == pytest.approx(2 * one, rel=0.01)


def test_sizes_in_place_of_models_and_flags_of_the_verb(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shapes = [f"model.scratch={json.dumps({'teacher': LLAMA, 'student': LLAMA, 'vocab_size': 1000})}"]
    changes = ["model.teacher=null", "model.student=null", *TRAINED, *shapes]
    recipe = str(ROOT / "recipes" / "papers" / "base.yaml")
    flags = ["--pairs", "1e4", "--tokens-per-pair", "300", "--gpu", "4090", "--utilisation", "0.5"]
    assert main(["plan", recipe, *changes, *flags, "--json"]) == 0
    scale = json.loads(capsys.readouterr().out)["scale"]
    assert (scale["gpu"], scale["devices"], scale["strategy"], scale["utilisation"]) == ("4090", 1, "one", 0.5)
    assert {step["fits"]["one"] for step in scale["steps"]} == {1}
    assert main(["plan", recipe, *changes, *flags, "--devices", "2", "--strategy", "zero3"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.partition("at scale")[2].splitlines()]
    fits = {line[0]: line[4:] for line in lines if len(line) == 10}
    assert fits["distill-dpo-0"] == ["1", "2", "1", "1", "1", "-"]
    assert fits["signals-reference-train"] == ["1", "-", "-", "-", "-", "-"]
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="the built-in task has its own"):
        plan_recipe(load_recipe(QUICKSTART), tmp_path / "run", Scale(pairs=10))


def test_a_plan_of_data_that_are_there_has_the_same_parts(finished):
    """With the lengths of the data; the plan itself is the one without flags."""
    from support.tiny_runs import TINY

    recipe = load_recipe(QUICKSTART, TINY)
    plain, scaled = plan_recipe(recipe, finished[0]), plan_recipe(recipe, finished[0], Scale(gpu="L4"))
    assert scaled["steps"] == plain["steps"]
    assert "scale" not in plain
    held = {step["name"]: step["memory"]["one"] for step in scaled["scale"]["steps"]}
    for step in plain["steps"]:
        if step["kind"] == "distill":
            parts = held[step["name"]]  # Adam has two numbers for each gradient
            assert parts["weights"] + parts["optimizer"] * 3 // 2 == step["memory"]


# -- against PyTorch ---------------------------------------------------------------------------------------------------


def test_operations_are_those_that_pytorch_counts():
    """Of attention, PyTorch counts what a causal mask hides too: twice as much."""
    for config in (
        LlamaConfig(**LLAMA, num_key_value_heads=2, vocab_size=500),
        GPT2Config(n_embd=64, n_layer=2, n_head=4),
    ):
        model = meta(config).eval()
        model.set_attn_implementation("eager")  # the counter does not see fused attention
        with FlopCounterMode(display=False) as counter:
            model(input_ids=torch.zeros(1, 96, dtype=torch.long, device="meta"))
        layers, head = forward_flops(model, Text(0, 96))
        attention = 4 * config.num_hidden_layers * 64 * 96**2 / 2
        assert layers + head + attention == counter.get_total_flops()


@pytest.mark.parametrize("lora", [None, {"r": 16}])
def test_operations_of_training_are_those_that_pytorch_counts(lora):
    model, training = meta(LlamaConfig(**LLAMA, vocab_size=500)), Training.model_validate({"lora": lora})
    planned = training_flops(model, training, Text(0, 96))
    attention = 4 * 3 * 64 * 96**2 / 2
    model.set_attn_implementation("eager")
    if lora:
        model = get_peft_model(model, adapter_config(training))
        model.enable_input_require_grads()  # as if there were layers below
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, 96, dtype=torch.long, device="meta")).logits.sum().backward()
    assert planned + 3 * attention == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_operations_of_experts_and_of_training():
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    config = Qwen2MoeConfig(
        **LLAMA, **experts, num_key_value_heads=4, vocab_size=500, shared_expert_intermediate_size=32
    )
    model = meta(config)
    layers, _ = forward_flops(model, Text(0, 1))
    # attention, router, the two experts of eight, the shared one and its gate
    weights = 3 * (4 * 64 * 64 + 8 * 64 + 2 * 3 * 64 * 32 + 3 * 64 * 32 + 64)
    assert layers == pytest.approx(2 * weights + 4 * 3 * 64 / 2)

    model, text = meta(LlamaConfig(**LLAMA, vocab_size=500)), Text(10, 20, 2)
    layers, head = forward_flops(model, text)
    plain, checkpointed = Training(), Training(gradient_checkpointing=True)
    lora = Training.model_validate({"lora": {}})
    assert training_flops(model, plain, text) == 3 * (layers + head)
    assert training_flops(model, checkpointed, text) == 4 * layers + 3 * head
    adapter = 3 * 16 * (4 * (64 + 64) + 3 * (64 + 160))  # rank 16 of every matrix of the layers
    attention = 4 * 3 * 64 * text.attended
    assert training_flops(model, lora, text) == 2 * (layers + head) + 6 * adapter * 50 + attention
    apart = Text(10, 20, 2, shared=False)
    assert (apart.tokens, text.tokens) == (60, 50)
    assert apart.attended == 2 * 30**2 / 2


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("config", [LlamaConfig(**LLAMA, vocab_size=500), GPT2], ids=["llama", "gpt2"])
def test_activations_are_what_a_pass_saves(config, bf16):
    model = AutoModelForCausalLM.from_config(config).train()
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        mask = torch.ones(2, 1, 256, 256, dtype=torch.bool)
        backbone_of(model)(input_ids=torch.zeros(2, 256, dtype=torch.long), attention_mask=mask, use_cache=False)
    measured = sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in own)
    matrices = {weight.shape for weight in model.parameters()}
    copies = [t for t in saved.values() if bf16 and t.dtype is torch.bfloat16 and {t.shape, t.shape[::-1]} & matrices]
    measured -= sum(tensor.untyped_storage().nbytes() for tensor in copies)
    layer, around = activation_bytes(meta(config), 2, 256, bf16, torch.float32)
    assert 3 * layer + around == pytest.approx(measured, rel=0.2)


class Copies(Held):
    """Counts the 16-bit copies of some weights that are alive."""

    def __init__(self, model, shapes):
        super().__init__(model)
        self.shapes = shapes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returned = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and returned.dtype is torch.bfloat16:
            if returned.shape in self.shapes:
                self._add(returned.untyped_storage())
            self.peak = max(self.peak, self.now)
        return returned


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["all weights", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("caching", [False, True])  # False: under FSDP2
def test_16_bit_copies_are_those_that_a_step_keeps(lora, checkpointing, caching):
    """Backward needs those of all layers, with checkpointing of one; autocast caches those of trained weights."""
    training = Training.model_validate({"bf16": True, "lora": lora, "gradient_checkpointing": checkpointing})
    config = LlamaConfig(**LLAMA, vocab_size=100)
    model = AutoModelForCausalLM.from_config(config).train()
    shapes = {weight.shape for name, weight in model.named_parameters() if "norm" not in name}
    if lora:
        model = get_peft_model(model, adapter_config(training))
        model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with Copies(model, shapes) as copies:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=caching):
            loss = model(input_ids=torch.zeros(2, 9, dtype=torch.long), use_cache=False).logits.float().sum()
        loss.backward()
    planned = training_memory(meta(config), training, "float32", 9)
    assert copies.peak == pytest.approx(planned.copies if caching else planned.uncached, rel=0.01)


def test_fsdp2_gathers_in_float32_and_zero3_in_16_bits_by_hand():
    """In float32 with bf16 autocast; a layer's matrices, the table of embeddings, and the head."""
    model = meta(LlamaConfig(**LLAMA, vocab_size=1000))
    layer, head, norms = 4 * 64**2 + 3 * 64 * 160, 1000 * 64, 7 * 64
    held = training_memory(model, Training(bf16=True), "float32", 128)
    gathered = 4 * (2 * layer + 2 * head + norms)
    assert held.parts("fsdp2", 2)["copies"] == gathered + 2 * (3 * layer + head)
    share = held.gradients // 2
    assert held.parts("fsdp2", 2)["gradients"] == share + 4 * (layer + 2 * head + norms)
    # DeepSpeed keeps up to 1e9 weights gathered, here all
    zero3 = held.parts("zero3", 2)
    assert (zero3["copies"], zero3["gradients"]) == (2 * (3 * layer + head) + 4 * (head + norms), share)
    checkpointed = training_memory(model, Training(bf16=True, gradient_checkpointing=True), "float32", 128)
    assert checkpointed.parts("fsdp2", 2)["copies"] == gathered + 2 * max(layer, head)
    adapted = training_memory(model, Training.model_validate({"bf16": True, "lora": {}}), "float32", 128)
    assert adapted.parts("fsdp2", 2)["copies"] == gathered + 2 * (3 * layer + head)
    plain = training_memory(model, Training(), "float32", 128)
    assert plain.parts("fsdp2", 2)["copies"] == gathered
    assert plain.parts("zero3", 2)["copies"] == 4 * (3 * layer + 2 * head + norms)


def test_sharding():
    held = Memory(
        weights=80, gradients=80, optimizer=160, copies=40, activations=10, head=5, micro_batches=64,
        unit=3, unit_gradients=1, uncached=2, zero3_unit=4,
    )  # fmt: skip
    assert sum(held.parts().values()) == 375
    assert sum(held.parts("ddp", 4).values()) == 375 + 80
    assert held.parts("zero2", 4) == held.parts() | {"gradients": 20, "optimizer": 60}
    share = {"weights": 10, "gradients": 10, "optimizer": 20, "activations": 10, "head": 5}
    assert held.parts("zero3", 8) == share | {"copies": 4}
    assert held.parts("fsdp2", 8) == share | {"copies": 5, "gradients": 11}
    assert held.state == 320
    for room, counts in (
        (375, (1, None, 1, 1, 1)), (455, (1, 2, 1, 1, 1)), (61, (None, None, None, 8, 8)), (20, (None,) * 5),
    ):  # fmt: skip
        strategies, training = ("one", "ddp", "zero2", "zero3", "fsdp2"), Training(batch_size=64, micro_batch_size=1)
        assert tuple(fewest(held, one, room / USABLE + 1e-6, training) for one in strategies) == counts
    assert all(gpu.memory > 2e10 and gpu.flops > 5e13 for gpu in GPUS.values())


def test_a_step_of_one_micro_batch_has_no_gradients_before_its_head():
    held = Memory(weights=80, gradients=80, optimizer=160, activations=60, head=30, last=5, micro_batches=1, unit=3)
    peak = {"weights": 80, "optimizer": 160, "copies": 0}
    assert held.parts() == peak | {"gradients": 0, "activations": 60, "head": 30}
    assert replace(held, micro_batches=2).parts() == peak | {"gradients": 80, "activations": 60, "head": 30}
    # or the gradients are more than what they come after
    assert replace(held, head=20).parts() == peak | {"gradients": 80, "activations": 5, "head": 0}
    # devices share the micro-batches; DDP has its buckets from the start
    four = replace(held, micro_batches=4)
    assert [four.parts("fsdp2", n)["gradients"] for n in (2, 4)] == [40, 0]
    assert [four.parts("ddp", n)["gradients"] for n in (2, 4)] == [160, 80]

    model = meta(LlamaConfig(**LLAMA, vocab_size=500))
    one, two = (training_memory(model, Training(batch_size=n, micro_batch_size=4), "float32", 128) for n in (4, 8))
    assert (one.micro_batches, two.micro_batches) == (1, 2)
    assert one.total < two.total


def test_a_mixture_of_experts_is_held_at_a_rule_of_thumb():
    model = meta(Qwen2MoeConfig(**LLAMA, vocab_size=500, num_experts=4))
    layer, _ = activation_bytes(model, 2, 128, False, torch.float32)
    assert layer == 34 * 2 * 128 * 64 * 2
    assert training_memory(model, Training(), "float32", 128).activations > 3 * layer


# -- reading and sampling ----------------------------------------------------------------------------------------------


def test_what_a_pass_without_gradients_holds_by_hand():
    """In the MLP: embeddings, a layer's input, what attention made of it, its norm; three as wide as the MLP."""
    rows, tokens = 3, 64
    config = LlamaConfig(hidden_size=64, intermediate_size=640, num_hidden_layers=5, vocab_size=500)
    mask = rows * tokens**2
    for dtype in (torch.float32, torch.bfloat16):
        by_hand = rows * tokens * (4 * 64 + 3 * 640) * dtype.itemsize + mask
        assert pass_bytes(meta(config), rows, tokens, False, dtype) == pytest.approx(by_hand, rel=0.03)
    # the longer the row, the larger is its mask, and a copy of it as numbers that attention adds
    long, short = (pass_bytes(meta(config), 1, tokens, False, torch.bfloat16) for tokens in (8192, 4096))
    assert long - 2 * short == pytest.approx((8192**2 - 2 * 4096**2) * (1 + 2), rel=0.1)


@pytest.mark.parametrize(("kind", "vocabulary"), [("logps", 100), ("topk", 12_000)])
@pytest.mark.parametrize(("dtype", "bf16"), [("float32", False), ("float32", True), ("bfloat16", False)])
def test_reading_holds_what_is_planned(monkeypatch, kind, vocabulary, dtype, bf16):
    """With a small vocabulary the layers hold the most, with a large one the head."""
    tiles = dict.fromkeys(("cpu", "other"), 2**20)
    monkeypatch.setattr(logprobs, "ROWS_ELEMENTS", 2**40)  # as on a GPU
    for module in (logprobs, memory):
        monkeypatch.setattr(module, "TILE_ELEMENTS", tiles)
    config = LlamaConfig(**LLAMA, num_key_value_heads=2, vocab_size=vocabulary, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    tokenizer = make_tokenizer(vocabulary)
    ids = list(range(10, 50))
    columns = {"prompt_ids": ids, "chosen_ids": ids * 2, "rejected_ids": ids * 2}
    rows = Dataset.from_list(
        [{"row": row, "chosen_ended": True, "rejected_ended": True, **columns} for row in range(4)]
    )
    layout = Layout("masked", 0.0)
    with Held(model) as held:
        score_pairs(model, rows, tokenizer, (kind,), bf16=bf16, batch_tokens=4 * 200, layout=layout)
    weights = weight_bytes(model, dtype)
    planned = reading_memory(
        model, weights, 4 * 200, 200, dtype, scored=160 / 200, bf16=bf16, k=50 if kind == "topk" else 0
    )
    assert (planned.head > 0) == (vocabulary > 1000)
    assert planned.total == pytest.approx(weights + held.peak, rel=0.2)


@pytest.mark.parametrize(("prompt", "new"), [(200, 4), (8, 40)])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_sampling_holds_what_is_planned(prompt, new, top_p):
    """With long prompts the pass over them holds the most, with long responses the keys and values."""
    config = LlamaConfig(**LLAMA, num_key_value_heads=2, vocab_size=500, tie_word_embeddings=True)
    model, tokenizer = AutoModelForCausalLM.from_config(config).eval(), make_tokenizer(500)
    sampling = Sampling(batch_size=16, max_new_tokens=new, top_p=top_p, temperature=0.9)
    engine, weights = TransformersEngine(model, tokenizer, sampling), weight_bytes(model, "float32")
    with Held(model) as held:
        engine.generate([[10] * prompt] * 16, [new] * 16, 0, Progress("sampling", 0, shown=False))
    planned = sampling_memory(model, weights, 16, prompt, new, "float32", top_p=top_p)
    assert (planned.head > 0) == (prompt < new)
    assert planned.total == pytest.approx(weights + held.peak, rel=0.2)
