"""The same tokenizer and model with every token at another id."""

import copy
import json

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast


def permuted(tokenizer, seed=0):
    """A copy in which every token has another id, and the permutation, by the old id."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    order = np.random.default_rng(seed).permutation(len(tokenizer))
    if rules["model"]["type"] == "Unigram":
        pieces = rules["model"]["vocab"]
        rules["model"]["vocab"] = [pieces[old] for old in np.argsort(order)]
        rules["model"]["unk_id"] = int(order[rules["model"]["unk_id"]])
    else:
        rules["model"]["vocab"] = {token: int(order[old]) for token, old in rules["model"]["vocab"].items()}
    for added in rules["added_tokens"]:
        added["id"] = int(order[added["id"]])
    reordered = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(rules)),
        **{name: getattr(tokenizer, name) for name in ("pad_token", "eos_token", "bos_token", "unk_token")},
        extra_special_tokens=[*tokenizer.extra_special_tokens],
        chat_template=tokenizer.chat_template,
    )
    return reordered, order


def with_ids(model, order):
    """A copy of a model whose token i has the id order[i]."""
    model = copy.deepcopy(model)
    for rows in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
        rows.data[order] = rows.data[: len(order)].clone()
    return model
