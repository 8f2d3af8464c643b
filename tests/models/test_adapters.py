"""PEFT adapters of every kind: read exactly, merged or beside their base, or refused."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from prefdistill.core.errors import UserError
from prefdistill.data.batches import Document, make_batch
from prefdistill.data.encoder import reward_model_ids
from prefdistill.evaluation.reward_model import RewardModel
from prefdistill.experiment.step import Context
from prefdistill.experiment.steps.students import Distill
from prefdistill.models.adapters import check_start
from prefdistill.models.hub import adapter_base
from prefdistill.models.identity import model_identity, model_key
from prefdistill.models.load import check_model, check_reward_model, empty_model, load_model, load_tokenizer
from prefdistill.models.logprobs import reduce_logits, token_logps

IDS = torch.tensor([[5, 7, 11, 30, 2, 9, 14, 30, 7, 21]])
EMBED, HEAD = "embed_tokens", "lm_head"
# adapters on a model with tied embeddings: settings, and whether the merged model still ties them (None: not merged)
KINDS = {
    "linear": ({"target_modules": "all-linear"}, True),
    "dora": ({"target_modules": "all-linear", "use_dora": True}, True),
    "rslora": ({"target_modules": "all-linear", "use_rslora": True}, True),
    "head": ({"target_modules": ["q_proj", HEAD]}, False),
    "embeddings": ({"target_modules": ["q_proj", EMBED]}, False),
    "dora on both": ({"target_modules": [HEAD, EMBED], "use_dora": True}, False),
    "tied on both": ({"target_modules": ["q_proj", EMBED], "ensure_weight_tying": True}, False),
    "saved head": ({"target_modules": ["q_proj"], "modules_to_save": [HEAD]}, False),
    "saved embeddings": ({"target_modules": ["q_proj"], "modules_to_save": [EMBED]}, False),
    "saved tied": ({"target_modules": ["q_proj"], "modules_to_save": [EMBED], "ensure_weight_tying": True}, True),
    "tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": [7, 30]}, True),
    "tokens of the head": ({"target_modules": ["q_proj"], "trainable_token_indices": {HEAD: [7, 30]}}, None),
    "one layer": ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, True),
    "ranks": ({"target_modules": "all-linear", "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 9}}, True),
    "biases": ({"target_modules": "all-linear", "bias": "all"}, True),
    "bias of lora": ({"target_modules": ["q_proj"], "lora_bias": True}, None),
    "pissa": ({"target_modules": "all-linear", "init_lora_weights": "pissa"}, True),
    "olora": ({"target_modules": "all-linear", "init_lora_weights": "olora"}, True),
    "ia3": (IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), True),
    "loha": (LoHaConfig(r=2, target_modules=["q_proj"]), True),
}


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


@pytest.fixture
def base(tmp_path, make_model, tokenizer):
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def adapt(tmp_path, base):
    """Save an adapter on the base whose every trained weight has changed; return its directory and the PeftModel."""

    def make(config=None, name="adapter", scale=0.2, start=None, **settings):
        torch.manual_seed(1)
        config = config or LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | settings)
        model = get_peft_model(start or AutoModelForCausalLM.from_pretrained(base), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * scale)
        model.save_pretrained(tmp_path / name)
        return str(tmp_path / name), model.eval()

    return make


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_read_exactly(tmp_path, adapt, base, kind):
    settings, tied = KINDS[kind]
    name, live = adapt(**settings) if isinstance(settings, dict) else adapt(settings)
    expected = logits(live)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.5
    model = load_model(name, dtype="float32").eval()
    torch.testing.assert_close(logits(model), expected, atol=1e-3, rtol=1e-4)
    assert isinstance(model, PeftModel) is (tied is None)
    if tied is not None:
        assert model.config.tie_word_embeddings is tied
        assert all(weight.requires_grad for weight in model.parameters())
        model.save_pretrained(tmp_path / "merged")
        torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(model))
    # beside its base, what it does to the head is in every tile, also where two responses share a row
    prompt, responses = IDS[0, :4].tolist(), [IDS[0, 4:].tolist(), [7, 30, 30]]
    batch = make_batch([[Document(prompt, list(enumerate(responses)))]], 0)
    with torch.no_grad():
        (found,) = reduce_logits(live, batch, token_logps, batch["tokens"], tile=2)
    for response, part in zip(responses, found.split(batch["sizes"]), strict=True):
        naive = logits(live, torch.tensor([prompt + response]))[0, 3:-1].log_softmax(-1)
        naive = naive.gather(-1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(part[: len(response)], naive, atol=1e-3, rtol=1e-4)


def test_a_small_adapter_survives_16_bits(adapt, base):
    name, live = adapt(target_modules="all-linear", scale=0.004)
    model = load_model(name, dtype="bfloat16")
    assert isinstance(model, PeftModel)
    plain = load_model(base, dtype="bfloat16")
    change = logits(live) - logits(load_model(base, dtype="float32"))
    in_16_bits = logits(model) - logits(plain)
    aligned = torch.nn.functional.cosine_similarity(in_16_bits.flatten(), change.flatten(), dim=0)
    merged = logits(load_model(name, dtype="float32").bfloat16()) - logits(plain)
    assert aligned > torch.nn.functional.cosine_similarity(merged.flatten(), change.flatten(), dim=0)
    # the scale of an adapter is in no weight
    model.peft_config["default"].lora_alpha = 9
    other = model_identity(model)
    model.peft_config["default"].lora_alpha = 8
    assert other["weights_sha256"] == model_identity(model)["weights_sha256"]
    assert other != model_identity(model)


def test_a_trained_student_is_read_as_it_is_saved():
    """In a run in 16 bits, what an adapter learnt may be saved in float32."""
    context = SimpleNamespace(recipe=SimpleNamespace(model=SimpleNamespace(dtype="bfloat16")))
    trained = SimpleNamespace(made_by=object.__new__(Distill))
    for model, dtype in ((None, "bfloat16"), (SimpleNamespace(made_by=None), "bfloat16"), (trained, "auto")):
        assert Context.load_options(context, "student", model)["dtype"] == dtype
    context.recipe.model.dtype = "float32"
    assert Context.load_options(context, "student", trained)["dtype"] == "float32"


def test_what_a_training_can_start_from(adapt, base):
    name, _ = adapt(target_modules="all-linear")
    for model, dtype in ((base, "bfloat16"), (name, "float32"), (name, "auto")):
        check_start(model, dtype)
    with pytest.raises(UserError, match=r"16 bits .* dtype=float32"):
        check_start(name, "bfloat16")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PROMPT_TUNING that adds virtual tokens"),
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PREFIX_TUNING that adds virtual tokens"),
        (LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]), "an adapter for SEQ_CLS, not for CAUSAL_LM"),
        (LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa_niter_2"), "path_initial_model_for_weight"),
        (LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[5]), "active only after certain tokens"),
    ],
    ids=["prompt", "prefix", "task", "initialisation", "invocation"],
)
def test_adapters_that_are_refused(tmp_path, adapt, config, reason):
    if config.task_type == "SEQ_CLS":
        config.save_pretrained(tmp_path / "adapter")
        path = tmp_path / "adapter" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
        name = str(tmp_path / "adapter")
    else:
        name, _ = adapt(config)
    for refuse in (check_model, load_model, lambda model: check_start(model, "float32")):
        with pytest.raises(UserError, match=reason):
            refuse(name)


def test_weights_that_an_adapter_lacks_are_refused(tmp_path, adapt):
    name, _ = adapt(target_modules=["q_proj"])
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["q_proj", "k_proj"]}))
    with pytest.raises(UserError, match=r"lacks weights of its adapter.*k_proj"):
        load_model(name)


def test_a_directory_of_several_adapters(tmp_path, adapt):
    adapt(target_modules=["q_proj"], name="all/one")
    adapt(target_modules=["k_proj"], name="all/two")
    with pytest.raises(UserError, match="adapters in subdirectories; name one of them: one, two"):
        load_model(str(tmp_path / "all"))
    load_model(str(tmp_path / "all" / "two"))


def test_an_adapter_on_an_adapter_is_read_in_float32(adapt, base):
    first, _ = adapt(target_modules=["q_proj"], name="first")
    second, live = adapt(target_modules=["q_proj", "v_proj"], name="second", start=load_model(first, dtype="float32"))
    assert adapter_base(second) == first
    torch.testing.assert_close(logits(load_model(second, dtype="float32")), logits(live), atol=1e-3, rtol=1e-4)
    assert load_tokenizer(second).name_or_path == base  # neither has its own
    with pytest.raises(UserError, match=r"is an adapter on the adapter .* in float32 only"):
        load_model(second, dtype="bfloat16")


def test_a_base_that_is_missing_is_named_with_the_key_to_edit(tmp_path, adapt):
    name, _ = adapt(target_modules=["q_proj"])
    shutil.move(tmp_path / "base", tmp_path / "elsewhere")
    for refuse in (check_model, load_model, load_tokenizer):
        with pytest.raises(
            UserError, match=r"the base of the adapter .*adapter is missing: .* base_model_name_or_path"
        ):
            refuse(name)


def test_the_base_of_an_adapter_is_found_beside_it_after_a_move(tmp_path, adapt):
    name, live = adapt(target_modules=["q_proj"], name="run/adapter")
    shutil.move(tmp_path / "base", tmp_path / "run" / "base")
    assert adapter_base(name) == str(tmp_path / "run" / "base")
    torch.testing.assert_close(logits(load_model(name, dtype="float32")), logits(live), atol=1e-3, rtol=1e-4)


def test_added_tokens(adapt, base):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), load_tokenizer(base)
    rows = len(tokenizer)
    tokenizer.add_tokens(["<new>", "<other>"])
    model.resize_token_embeddings(rows + 8)  # more than the tokenizer has
    name, live = adapt(target_modules=["q_proj"], modules_to_save=[EMBED, HEAD], start=model)
    tokenizer.save_pretrained(name)
    assert empty_model(name).get_input_embeddings().weight.shape[0] == rows + 8
    new = torch.tensor([[5, rows, rows + 1, 7]])
    torch.testing.assert_close(logits(load_model(name, dtype="float32"), new), logits(live, new), atol=1e-3, rtol=1e-4)


def test_a_base_of_a_revision(tmp_path, adapt, base, monkeypatch):
    name, _ = adapt(target_modules=["q_proj"])
    path, revisions = tmp_path / "adapter" / "adapter_config.json", []
    path.write_text(json.dumps(json.loads(path.read_text()) | {"revision": "v1"}))
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda *args, **options: revisions.append(options.get("revision")) or load(*args, **options),
    )
    load_model(name)
    assert revisions == ["v1"]
    settings = json.loads(path.read_text()) | {"base_model_name_or_path": "org/model"}
    path.write_text(json.dumps(settings))
    requests = []
    monkeypatch.setattr(
        "prefdistill.models.identity.pinned_revision",
        lambda name, revision=None: requests.append((name, revision)),
    )
    model_key(name)
    assert set(requests) == {("org/model", "v1")}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("base_head", [False, True], ids=["of a language model", "of a classifier"])
def test_a_reward_model_with_an_adapter(tmp_path, adapt, base, base_head):
    start = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    if base_head:
        start.save_pretrained(tmp_path / "classifier")
        load_tokenizer(base).save_pretrained(tmp_path / "classifier")
        start = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    name, live = adapt(target_modules="all-linear", task_type="SEQ_CLS", start=start)
    check_reward_model(name)
    model = RewardModel(name)
    assert type(model.model).__name__ == "LlamaForSequenceClassification"
    prompt, response = [{"role": "user", "content": "the cat"}], [{"role": "assistant", "content": "sat on the mat"}]
    expected = logits(live, torch.tensor([reward_model_ids(model.tokenizer, prompt, response)]))
    assert abs(float(expected) - model.score([prompt], [response])[0]) < 1e-3
    with pytest.raises(UserError, match="an adapter for SEQ_CLS, not for CAUSAL_LM"):
        load_model(name)
