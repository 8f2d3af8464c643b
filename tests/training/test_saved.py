"""What a training saves: ready to serve, and verified to be the trained model."""

import importlib.util
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from prefdistill import METHODS
from prefdistill.core.errors import UserError
from prefdistill.data.truncation import Truncation
from prefdistill.models.load import load_model, load_tokenizer
from prefdistill.models.scratch import random_model
from prefdistill.training import saved
from prefdistill.training.arguments import training_arguments
from prefdistill.training.factory import make_trainer
from prefdistill.training.loop import fit
from prefdistill.training.options import DPOTraining, Training
from prefdistill.training.trainer import PrefDistillTrainer
from prefdistill.training.trl import train_reward, train_with_trl
from support.tokenizer_styles import STYLES, make_tokenizer

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
OPTIONS = {"max_steps": 2, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-2}
LORA = {"lora": {"r": 4}}


@pytest.fixture
def rows(pairs):
    return pairs.select_columns(["prompt", "chosen", "rejected"]).select(range(8))


@pytest.fixture
def start(tmp_path):
    """Save a model whose generation_config stops at EOS, at a word, and at an id that the tokenizer lacks."""

    def make(style="phi3", dtype=torch.float32, **shape):
        tokenizer = make_tokenizer(style, pad="<pad>")
        model = random_model(tokenizer, SHAPE | shape, 0).to(dtype)
        word = tokenizer.convert_tokens_to_ids("a")
        model.generation_config = GenerationConfig(
            eos_token_id=[tokenizer.eos_token_id, word, 99_999], pad_token_id=word, bos_token_id=tokenizer.bos_token_id
        )
        model.save_pretrained(tmp_path / "start")
        tokenizer.save_pretrained(tmp_path / "start")
        return str(tmp_path / "start"), tokenizer

    return make


def distill(method, start, rows, tokenizer, out, **options):
    training = Training(**OPTIONS | options)
    trainer = make_trainer(METHODS[method](), lambda: load_model(start), rows, tokenizer, training, out)
    fit(trainer, out, method, verify=training.verify)
    return trainer


@pytest.fixture
def compared(monkeypatch):
    """Record the rows that are compared."""
    seen = []
    rows_of = saved._rows
    monkeypatch.setattr(saved, "_rows", lambda *args: seen.append(rows_of(*args)) or seen[-1])
    return seen


def train(kind, start, rows, tokenizer, out, **options):
    options = OPTIONS | options
    if kind == "teacher-sft":
        demonstrations = rows.rename_column("chosen", "completion").select_columns(["prompt", "completion"])
        train_with_trl(start, demonstrations, tokenizer, Training(**options), out, truncation=Truncation(), what=kind)
    elif kind == "teacher-dpo":
        train_with_trl(start, rows, tokenizer, DPOTraining(**options), out, truncation=Truncation(), what=kind)
    else:
        distill(kind, start, rows, tokenizer, out, **options)


@pytest.mark.parametrize("options", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["sft", "teacher-sft", "teacher-dpo"])
def test_every_training_saves_the_ids_it_was_trained_with(tmp_path, start, rows, compared, kind, options):
    place, tokenizer = start()
    train(kind, place, rows, tokenizer, tmp_path / "out", **options)
    assert [len(rows) for rows in compared] == [3]
    assert all(8 < len(row) <= saved.TOKENS for row in compared[0])
    end = tokenizer.convert_tokens_to_ids(STYLES["phi3"].end)
    config = GenerationConfig.from_pretrained(tmp_path / "out")
    assert config.eos_token_id == [end, tokenizer.eos_token_id]  # no word, and nothing that the tokenizer lacks
    assert config.pad_token_id == tokenizer.pad_token_id
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    for name in ("pad_token", "eos_token", "bos_token", "chat_template"):
        assert getattr(again, name) == getattr(tokenizer, name)


@pytest.mark.parametrize("style", STYLES)
def test_the_end_of_every_template_is_an_end_token(style):
    tokenizer = make_tokenizer(style)
    model = random_model(tokenizer, SHAPE, 0)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("a")
    saved.set_generation_config(model, tokenizer)
    ends = [STYLES[style].end or tokenizer.eos_token, tokenizer.eos_token]
    ids = model.generation_config.eos_token_id
    assert (ids if isinstance(ids, list) else [ids]) == tokenizer.convert_tokens_to_ids(list(dict.fromkeys(ends)))


def test_special_end_tokens_of_the_start_stay():
    """Such as Llama's <|eom_id|>, which ends a turn that calls a tool."""
    tokenizer = make_tokenizer("llama3")
    model = random_model(tokenizer, SHAPE, 0)
    other = tokenizer.convert_tokens_to_ids("<|start_header_id|>")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, other]
    saved.set_generation_config(model, tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert model.generation_config.eos_token_id == [end, tokenizer.eos_token_id, other]


@pytest.mark.parametrize("options", [{}, {"lora": {"r": 8, "alpha": 32}}], ids=["full", "lora"])
def test_a_saved_model_answers_in_a_pipeline_and_ends(tmp_path, start, rows, options):
    place, tokenizer = start()
    one = rows.select([0] * 4)
    distill("sft", place, one, tokenizer, tmp_path / "out", **options | {"max_steps": 80, "learning_rate": 2e-2})
    chat = pipeline("text-generation", model=str(tmp_path / "out"), device="cpu")
    (reply,) = chat(one[0]["prompt"], max_new_tokens=60, do_sample=False)
    assert reply["generated_text"][-1] == one[0]["chosen"][0]


def test_a_reward_model_is_saved_and_verified(tmp_path, rows):
    tokenizer = make_tokenizer("phi3", pad="<pad>")
    make_model = partial(random_model, tokenizer, SHAPE, 0, reward=True)
    train_reward(make_model, rows, tokenizer, Training(**OPTIONS), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def altered(model):
    with torch.no_grad():
        model.get_input_embeddings().weight[5:] += 0.1
    return model


@pytest.mark.parametrize("options", [{}, LORA], ids=["full", "lora"])
def test_a_saved_model_that_differs_is_an_error(tmp_path, start, rows, monkeypatch, options):
    from transformers import Trainer

    place, tokenizer = start()
    save = Trainer.save_model

    def save_altered(self, *args, **kwargs):
        if not options:
            altered(self.model)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "save_model", save_altered)
    if options:
        merged = saved._merged
        monkeypatch.setattr(saved, "_merged", lambda *args: altered(merged(*args)))
    out = tmp_path / "out"
    with pytest.raises(
        UserError, match=r"does not give the logits of the trained model: they differ by .*--no-verify"
    ) as error:
        distill("sft", place, rows, tokenizer, out, **options)
    assert str(error.value).startswith(f"{out} does not")
    assert f"{out / 'adapter'} does not" not in str(error.value)
    distill("sft", place, rows, tokenizer, out, **options, verify=False)
    assert (out / "adapter").is_dir() is bool(options)


def test_an_adapter_that_names_another_base_is_an_error(tmp_path, start, rows):
    place, tokenizer = start()
    other = tmp_path / "other"
    random_model(tokenizer, SHAPE, 1).save_pretrained(other)
    training = Training(**OPTIONS | LORA)
    load = lambda: AutoModelForCausalLM.from_pretrained(place)  # noqa: E731
    for base, message in ((other, "does not give the logits"), (tmp_path / "none", "cannot be loaded again")):
        out = tmp_path / base.name / "out"
        trainer = make_trainer(METHODS["sft"](), load, rows, tokenizer, training, out)
        trainer.model.peft_config["default"].base_model_name_or_path = str(base)
        with pytest.raises(UserError, match=f"^{out}/adapter {message}"):
            fit(trainer, out, "sft")


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 20)[None]).logits.float()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["sft", "teacher-sft", "teacher-dpo"])
def test_an_adapter_on_an_adapter_is_saved_with_its_base(tmp_path, start, rows, monkeypatch, kind):
    place, _ = start()
    first = str(tmp_path / "first")
    live = get_peft_model(
        AutoModelForCausalLM.from_pretrained(place),
        LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    live.save_pretrained(first)  # as PEFT saves it, without a tokenizer
    monkeypatch.chdir(tmp_path)
    train(kind, "first", rows, load_tokenizer(first), Path("out"), **LORA, learning_rate=0.1)
    monkeypatch.chdir("/")  # the names of the bases hold from everywhere
    out = tmp_path / "out"
    adapter = str(out / "adapter")
    trained = logits(AutoModelForCausalLM.from_pretrained(out))
    torch.testing.assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(adapter)), trained, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(load_model(adapter)), trained, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(out / "base")), logits(live.eval()), atol=1e-4, rtol=1e-4
    )
    assert (trained - logits(live)).abs().max() > 0.01
    shutil.move(out, tmp_path / "moved")  # prefdistill finds the base beside the adapter
    torch.testing.assert_close(logits(load_model(str(tmp_path / "moved" / "adapter"))), trained, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "config",
    [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": "all-linear", "init_lora_weights": "pissa"}],
)
def test_adapters_that_change_more_than_their_own_weights(tmp_path, start, rows, config):
    """The head that is tied to the embeddings, or the base when they are initialised."""
    place, tokenizer = start(tie_word_embeddings=True)
    out = tmp_path / "out"
    arguments = training_arguments(
        Training(**OPTIONS | {"learning_rate": 0.1}), out / "checkpoints", seed=0, data_seed=0
    )
    peft_config = LoraConfig(task_type="CAUSAL_LM", **config)
    model, method = load_model(place), METHODS["sft"]()
    trainer = PrefDistillTrainer(model, method, arguments, rows, (), tokenizer, peft_config=peft_config)
    fit(trainer, out, "sft")
    trained = logits(AutoModelForCausalLM.from_pretrained(out))
    assert (out / "base").exists() is ("init_lora_weights" in config)
    adapter = AutoPeftModelForCausalLM.from_pretrained(str(out / "adapter"))
    torch.testing.assert_close(logits(adapter), trained, atol=1e-4, rtol=1e-4)
    assert (trained - logits(AutoModelForCausalLM.from_pretrained(place))).abs().max() > 0.01


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.filterwarnings("ignore::UserWarning")  # of bitsandbytes, about kernels for a CPU
@pytest.mark.parametrize("kind", ["sft", "teacher-sft"])
def test_an_adapter_on_a_quantised_start_is_merged_into_full_weights(tmp_path, start, rows, kind):
    place, tokenizer = start(hidden_size=64, intermediate_size=64)
    load_model(place, quantization="4bit").save_pretrained(tmp_path / "quantised")
    tokenizer.save_pretrained(tmp_path / "quantised")
    train(kind, str(tmp_path / "quantised"), rows, tokenizer, tmp_path / "out", **LORA)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], config.get("quantization_config")) == ("float32", None)


@pytest.mark.parametrize(("rate", "dtype"), [(1e-4, "float32"), (0.05, "bfloat16")])
def test_what_an_adapter_learnt_is_not_rounded_away(tmp_path, start, rows, capsys, rate, dtype):
    place, tokenizer = start(dtype=torch.bfloat16)
    distill("sft", place, rows, tokenizer, tmp_path / "out", **LORA, learning_rate=rate)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert ("of what the adapter learnt away" in capsys.readouterr().err) is (dtype == "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bf16", [False, True])
def test_rounding_is_no_difference(tmp_path, start, rows, dtype, bf16):
    place, tokenizer = start(dtype=getattr(torch, dtype))
    options = LORA | {"bf16": bf16, "learning_rate": 1e-1}
    distill("sft", place, rows, tokenizer, tmp_path / "out", **options)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def test_verification_is_no_part_of_the_cache_key():
    assert Training(verify=False).cache_key() == Training().cache_key()


@pytest.mark.parametrize("option", ["use_dora", "use_rslora"])
def test_kinds_of_lora(tmp_path, start, rows, option):
    place, tokenizer = start()
    distill("sft", place, rows, tokenizer, tmp_path / "out", lora={"r": 4, option: True}, learning_rate=0.1)
    assert json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())[option]
