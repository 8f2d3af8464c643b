"""Start a reward model from a pretrained language model: its backbone with a new head for one score."""

from typing import TYPE_CHECKING

import torch

from prefdistill.core.errors import UserError
from prefdistill.models.hub import adapter_root, loading_place
from prefdistill.models.load import WITH_LOADING_INFO, check_weights, empty_model, load_error, without_report
from prefdistill.models.options import FromModel
from prefdistill.models.pruned import pruned

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def empty_classifier(source: FromModel, *, trust_remote_code: bool = False) -> "PreTrainedModel":
    """Return the reward model that `new_classifier` makes, without its weights, on the meta device.

    Raises:
        UserError: if there is no such model, it is an adapter, or layers cannot be left out of it.
    """
    if adapter_root(source.source) != source.source:
        raise UserError(f"{source.source} is an adapter; save it merged into its base to train a reward model from it")
    model = empty_model(source.source, reward=True, trust_remote_code=trust_remote_code)
    return model if source.layers is None else pruned(model, source.layers)


def new_classifier(
    source: FromModel, *, dtype: str = "float32", seed: int = 0, trust_remote_code: bool = False
) -> "PreTrainedModel":
    """Return a sequence classifier with one label on a pretrained model; a head that it does not have is random.

    Args:
        source: a language model, or a classifier with one label; perhaps fewer layers of it.
        dtype: of the weights.
        seed: of the head.

    Raises:
        UserError: if weights of the backbone are missing or do not fit.
    """
    from transformers import AutoModelForSequenceClassification

    empty_classifier(source, trust_remote_code=trust_remote_code)
    with torch.random.fork_rng(devices=[]), without_report():
        torch.manual_seed(seed)
        try:
            model, loading_info = AutoModelForSequenceClassification.from_pretrained(
                **loading_place(source.source),
                num_labels=1,
                dtype=getattr(torch, dtype),
                trust_remote_code=trust_remote_code,
                **WITH_LOADING_INFO,
            )
        except Exception as error:
            raise load_error("model", source.source, error) from error
    backbone = f"{model.base_model_prefix}."
    head = frozenset(key for key in loading_info["missing_keys"] if not key.startswith(backbone))
    check_weights("model", source.source, loading_info, head)
    return model if source.layers is None else pruned(model, source.layers)
