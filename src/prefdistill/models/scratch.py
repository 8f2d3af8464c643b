"""Make a small tokenizer and model from scratch: byte-level BPE and a randomly initialised Llama."""

import difflib
import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from prefdistill.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Arguments of a configuration that come from the tokenizer.
TOKEN_ARGUMENTS = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")

# Every role marker is a special token and nothing follows the end token, so no token can merge across the boundary
# between prompt and response, and a training conversation ends where a generated one does.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerBase":
    """Train a byte-level BPE tokenizer with a chat template.

    Args:
        texts: to learn the merges from.
        vocab_size: number of ids, at least the 256 bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        extra_special_tokens=special[3:],
        chat_template=CHAT_TEMPLATE,
    )


def random_model(
    tokenizer: "PreTrainedTokenizerBase | int", shape: dict[str, Any], seed: int, *, reward: bool = False
) -> "PreTrainedModel":
    """Return a randomly initialised Llama with the tokenizer's vocabulary.

    Args:
        tokenizer: its length is the size of the vocabulary; or that size alone.
        shape: `LlamaConfig` arguments: hidden_size, num_hidden_layers, ...
        seed: of the weights.
        reward: make a sequence classifier with one label, not a language model.

    Raises:
        UserError: on an argument that `LlamaConfig` does not have, or sizes that do not fit together.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

    fixed: dict[str, Any] = {"vocab_size": tokenizer if isinstance(tokenizer, int) else len(tokenizer)}
    fixed |= {name: getattr(tokenizer, name, None) for name in TOKEN_ARGUMENTS[1:]} | (
        {"num_labels": 1} if reward else {}
    )
    check_shape(shape, fixed)
    config = LlamaConfig(**shape, **fixed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind: Any = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
        return kind.from_config(config, dtype=torch.float32)


def check_shape(shape: dict[str, Any], fixed: dict[str, Any] | None = None) -> None:
    """Check that a model from scratch can have this shape; `fixed` are the arguments that the user does not choose.

    Raises:
        UserError: as `random_model` does.
    """
    import torch
    from transformers import LlamaConfig, LlamaModel

    fixed = fixed or {}
    known = inspect.signature(LlamaConfig).parameters.keys() - {*fixed, *TOKEN_ARGUMENTS}
    if unknown := [key for key in shape if key not in known]:  # transformers would accept and ignore them
        close = difflib.get_close_matches(str(unknown[0]), sorted(known), n=1)
        hint = f"did you mean {close[0]!r}?" if close else "it has hidden_size, num_hidden_layers, ..."
        raise UserError(f"the shape of a model from scratch has no {unknown[0]!r}; {hint}")
    try:
        with torch.device("meta"):
            LlamaModel(LlamaConfig(**shape, **fixed))
    except Exception as error:  # it may raise anything on strange values
        reason = " ".join(str(error).split())
        reason = f"there is no {reason}" if isinstance(error, KeyError) else reason
        raise UserError(f"a model of this shape cannot be made: {reason}") from error
