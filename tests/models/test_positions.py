"""Texts beyond the learned positions of a model are refused before a pass, with the number to set."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    OpenAIGPTConfig,
    OPTConfig,
    TrainingArguments,
)

from prefdistill import METHODS, PrefDistillTrainer
from prefdistill.core.errors import UserError
from prefdistill.models.positions import check_positions, learned_positions
from prefdistill.sampling.sampler import sample
from prefdistill.signals import extract_signals

SMALL = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
OPT = {"vocab_size": 50, "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (GPT2Config(**SMALL), 64),
        (OpenAIGPTConfig(**SMALL), 64),
        (GPTJConfig(**SMALL, rotary_dim=8), 64),
        (OPTConfig(**OPT, word_embed_proj_dim=16, max_position_embeddings=64), 64),
        (LlamaConfig(**LLAMA, num_attention_heads=2, max_position_embeddings=64), None),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_learned_positions_are_those_that_a_forward_accepts(config, limit):
    model = AutoModelForCausalLM.from_config(config).eval()
    assert learned_positions(model) == limit
    with torch.no_grad():
        model(input_ids=torch.ones(1, 64, dtype=torch.long))
    check_positions(64, model)
    if limit is None:
        check_positions(10_000, model)
        return
    with torch.no_grad(), pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.ones(1, 65, dtype=torch.long))
    with pytest.raises(UserError, match=r"up to 65 tokens .* 64 positions; set --max-length 64"):
        check_positions(65, model)


@pytest.fixture
def gpt2(tokenizer):
    torch.manual_seed(0)
    small = SMALL | {"vocab_size": len(tokenizer), "n_positions": 12}
    return AutoModelForCausalLM.from_config(GPT2Config(**small, bos_token_id=None, eos_token_id=tokenizer.eos_token_id))


def test_signals_training_and_sampling_refuse_longer_texts(gpt2, pairs, tokenizer, tmp_path):
    refused = pytest.raises(UserError, match="12 positions; set --max-length 12")
    with refused:
        extract_signals(gpt2.eval(), pairs, tokenizer, ("logps",), tmp_path / "signals", role="reference")
    with refused:
        args = TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none")
        PrefDistillTrainer(gpt2, METHODS["sft"](), args, pairs, processing_class=tokenizer)
    with refused:
        sample(gpt2.eval(), tokenizer, pairs["prompt"][:4], max_new_tokens=20)


def test_sampling_within_the_positions_does_not_pass_them_in_a_mixed_batch(gpt2, tokenizer):
    """A short prompt has room for a long response; beside a longer one it would run past the last position."""
    from prefdistill.core.progress import Progress
    from prefdistill.sampling.engines import TransformersEngine
    from prefdistill.sampling.options import Sampling

    engine = TransformersEngine(gpt2.eval(), tokenizer, Sampling(batch_size=8))
    with Progress("sampling", 2, "response") as progress:
        short, long = engine.generate([[5, 6], [5] * 9], [10, 3], 0, progress)
    assert 0 < len(short) <= 10
    assert 0 < len(long) <= 3
