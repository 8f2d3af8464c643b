"""Load GGUF files through transformers: weights dequantised, and a tokenizer of the file's own tokens."""

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def dequantizing_config() -> dict[str, Any]:
    """Return the argument of `from_pretrained` that unpacks a GGUF file, where transformers would keep its blocks."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)  # older versions always unpack
    return {"quantization_config": config(dequantize=True)} if config else {}


def remove_added_tokens(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Remove tokens that transformers adds to those of the file, such as `<|endoftext|>`: they have no embedding."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary, added = rules["model"]["vocab"], rules["added_tokens"]
    in_file = [token for token in added if not isinstance(vocabulary, dict) or token["content"] in vocabulary]
    if len(in_file) < len(added):
        text = json.dumps(rules | {"added_tokens": in_file})
        tokenizer.backend_tokenizer.__setstate__(text.encode())  # in place, as unpickling does
