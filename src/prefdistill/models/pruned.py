"""Make a model of some of the decoder layers of another, such as a student where a family has no small model."""

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prefdistill.core.errors import UserError
from prefdistill.core.progress import say
from prefdistill.models.hub import adapter_root
from prefdistill.models.identity import NOT_COMPUTING
from prefdistill.models.load import empty_model, load_model

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS = 64  # on which the saved model is compared with the whole one
TOLERANCE = 1e-4  # root mean square of the difference, in standard deviations of the logits: both run the same kernels


def layer_numbers(layers: int | Sequence[int], total: int) -> list[int]:
    """Return the numbers of the layers that are kept, from 0.

    Args:
        layers: how many: the first half of them and the last, so that a block in the middle is left out; or their
            numbers, rising.
        total: of the whole model.

    Raises:
        UserError: if the model does not have them, or none is left out.

    Example:
        >>> layer_numbers(5, 8), layer_numbers([0, 1, 7], 8)
        ([0, 1, 5, 6, 7], [0, 1, 7])
    """
    if isinstance(layers, int):
        first = layers // 2
        numbers = [*range(first), *range(total - layers + first, total)]
    else:
        numbers = list(layers)
    rising = all(low < high for low, high in itertools.pairwise(numbers))
    if not numbers or not rising or numbers[0] < 0 or numbers[-1] >= total or len(numbers) >= total:
        raise UserError(
            f"layers must be fewer than the {total} of the whole model, or rising numbers of 0 to {total - 1}, got "
            f"{layers}"
        )
    return numbers


def pruned(model: "PreTrainedModel", layers: int | Sequence[int]) -> "PreTrainedModel":
    """Return a model of some of the decoder layers of another: the same weights, and a configuration that fits them.

    On the meta device it tells, before any weight is read, whether the architecture can be cut.

    Args:
        model: of any architecture that is a list of decoder layers; it is left as it is.
        layers: as for `layer_numbers`.

    Raises:
        UserError: if it is quantised or has an unmerged adapter, or depends on its number of layers in another way.
    """
    if hasattr(model, "peft_config") or getattr(model.config, "quantization_config", None):
        raise UserError("layers can be left out of plain weights only: save the model merged and not quantised first")
    path, numbers = _layers_of(model)[0], layer_numbers(layers, len(_layers_of(model)[1]))
    weights = _renumbered(model.state_dict(), f"{path}.", numbers)
    build: Any = type(model)._from_config  # what every AutoModel's from_config calls
    try:
        with model.device:
            smaller: PreTrainedModel = build(_config(model, numbers), dtype=model.dtype)
    except Exception as error:  # it may raise anything on a configuration that does not fit
        raise UserError(f"{_refusal(model)}: {' '.join(str(error).split())[:300]}") from error
    expected = smaller.state_dict()
    unlike = [name for name in weights.keys() | expected.keys() if _shape(weights, name) != _shape(expected, name)]
    if unlike:
        raise UserError(f"{_refusal(model)}: the weights do not fit, the first is {min(unlike)}")
    if model.device.type != "meta":
        smaller.load_state_dict(weights)
        if model.can_generate():  # unlike a classifier
            smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller


def empty_pruned(name: str, layers: int | Sequence[int], *, trust_remote_code: bool = False) -> "PreTrainedModel":
    """Return a model of some of the decoder layers of a named one without its weights, on the meta device.

    Raises:
        UserError: as `pruned` and `empty_model` do; also for an adapter.
    """
    model = empty_model(name, trust_remote_code=trust_remote_code)
    if adapter_root(name) != name:
        raise UserError(f"{name} is an adapter; save it merged into its base before layers are left out of it")
    return pruned(model, layers)


def save_pruned(
    name: str,
    layers: int | Sequence[int],
    tokenizer: "PreTrainedTokenizerBase",
    out: Path,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Save a model of some of the decoder layers of another in `out`, in its dtype, with the tokenizer.

    Args:
        name: Hub name or directory of the whole model.
        layers: as for `layer_numbers`.

    Raises:
        UserError: as `pruned` does; also if what was saved does not give the logits of the whole model with the other
            layers skipped.
    """
    whole = load_model(name, trust_remote_code=trust_remote_code).eval()
    smaller = pruned(whole, layers)
    smaller.save_pretrained(out)
    tokenizer.save_pretrained(out)
    say(f"{smaller.config.get_text_config().num_hidden_layers} layers of {name}: {smaller.num_parameters():,} weights")
    ids = torch.randint(len(tokenizer), (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), _skipping(whole, layers):
        expected = whole(input_ids=ids, use_cache=False).logits.float()
    saved = load_model(str(out), trust_remote_code=trust_remote_code).eval()
    with torch.no_grad():
        difference = saved(input_ids=ids, use_cache=False).logits.float() - expected
    if not float(difference.square().mean().sqrt()) <= TOLERANCE * float(expected.std()):
        raise UserError(f"{_refusal(whole)}: without them it does not compute what it computes when they are skipped")


def _refusal(model: "PreTrainedModel") -> str:
    return f"layers cannot be left out of {model.name_or_path or 'the model'}, a {type(model).__name__}"


def _layers_of(model: "PreTrainedModel") -> "tuple[str, nn.ModuleList]":
    """Return the decoder layers of a model and their place: the one outermost list of that many modules."""
    total = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == total
    }
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outermost) != 1:
        raise UserError(f"{_refusal(model)}: it has {len(outermost)} lists of num_hidden_layers={total} layers")
    return outermost[0], lists[outermost[0]]


def _config(model: "PreTrainedModel", numbers: list[int]) -> Any:
    """Return the configuration with these layers: lists with an entry per layer, such as layer_types, follow."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    total = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == total and not NOT_COMPUTING.fullmatch(name):
            setattr(text, name, type(value)(value[number] for number in numbers))
    text.num_hidden_layers = len(numbers)
    return config


def _renumbered(weights: "dict[str, Tensor]", prefix: str, numbers: list[int]) -> "dict[str, Tensor]":
    """Return the weights without those of layers that are left out; the others have their new numbers."""
    places = {str(number): place for place, number in enumerate(numbers)}
    renumbered = {}
    for name, weight in weights.items():
        number, _, rest = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix):
            renumbered[name] = weight
        elif number in places:
            renumbered[f"{prefix}{places[number]}.{rest}"] = weight
    return renumbered


def _shape(weights: "dict[str, Tensor]", name: str) -> "torch.Size | None":
    return weights[name].shape if name in weights else None


@contextmanager
def _skipping(model: "PreTrainedModel", layers: int | Sequence[int]) -> Iterator[None]:
    """Have a model skip all decoder layers but these: what goes into a layer comes out of it."""

    def unchanged(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    modules = _layers_of(model)[1]
    kept = set(layer_numbers(layers, len(modules)))
    hooks = [
        module.register_forward_hook(unchanged, with_kwargs=True)
        for number, module in enumerate(modules)
        if number not in kept
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
