"""Cost of reducing a tile of logits to a few numbers per state, beside the product with the head that makes it.

    python -m benchmarks.reduction --shape small --threads 1 --clock cpu
    python -m benchmarks.reduction --shape llama-1b --dtype bfloat16 --compile inductor

Every call makes its tile, as a pass does: memory that is new costs page faults. Reductions are those of the signal
kinds, of logits in the model's dtype. Compiled variants are the same numbers as one graph, which `--compile` names the
backend of; their first call, which compiles, is only in the JSON.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import harness
from benchmarks.harness import Numbers, add_options, device_name, table, write_report
from benchmarks.shapes import SHAPES, make_head

KINDS = {
    "values": ("values",),
    "logps": ("logps",),
    "values and logps": ("values", "logps"),
    "top-50": ("topk",),
    "values and top-50": ("values", "topk"),
}
HEAD = "nothing"


def measure_tile(
    shape: dict[str, Any], dtype: str, elements: int, rounds: int, backend: str | None
) -> dict[str, Numbers]:
    """Return seconds of making a tile, alone and with each reduction: the first ones, and the median of some rounds."""
    import torch

    weight = make_head(shape, getattr(torch, dtype))
    states = max(1, elements // shape["vocab_size"])
    hidden = torch.randn(states, shape["hidden_size"], dtype=weight.dtype, device=weight.device)
    tokens = torch.randint(shape["vocab_size"], (states,), device=weight.device)

    @torch.no_grad()
    def tile() -> Any:
        return hidden @ weight.T

    calls = {HEAD: tile} | _reductions(tile, tokens, shape["vocab_size"], backend)
    numbers = {name: {"first": _seconds(call)} for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):  # in turns
        for name, call in calls.items():
            seconds[name].append(_seconds(call))
    for name, of_name in seconds.items():
        numbers[name] |= {"seconds": statistics.median(of_name), "least": min(of_name), "states": states}
    return numbers


def _seconds(call: Callable[[], Any]) -> float:
    harness.synchronize()
    start = harness.clock()
    call()
    harness.synchronize()
    return harness.clock() - start


def _reductions(make: Callable[[], Any], tokens: Any, rows: int, backend: str | None) -> dict[str, Callable[[], Any]]:
    """Return calls that make a tile and reduce it, by name: as the library does, and compiled."""
    import torch
    from torch import Tensor

    from prefdistill.models.logprobs import token_logps
    from prefdistill.signals.kinds import Settings, Tile, make_kinds
    from prefdistill.signals.topk import TopKRequest

    settings = Settings(topk=TopKRequest().manifest(rows, rows))
    last = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

    @torch.no_grad()
    def reduce(names: Sequence[str]) -> None:
        tile = Tile(make().float(), tokens, last, {})
        for kind in make_kinds(names, settings):
            kind.reduce(tile)

    def differentiate(of_tokens: Callable[[Tensor, Tensor], Tensor]) -> None:
        of_tokens(make().requires_grad_(), tokens).sum().backward()

    def total(logits: Tensor) -> Tensor:
        return torch.logsumexp(logits.float(), -1)

    def of_tokens(logits: Tensor, tokens: Tensor) -> Tensor:
        scores = logits.float()
        return scores.gather(-1, tokens[:, None])[:, 0] - torch.logsumexp(scores, -1)

    calls: dict[str, Callable[[], Any]] = {name: (lambda k=kinds: reduce(k)) for name, kinds in KINDS.items()}
    calls["token log-probs and gradient"] = lambda: differentiate(lambda z, a: token_logps(z.float(), a)[0])
    if backend is not None:
        fast_total, fast_tokens = (torch.compile(f, backend=backend, dynamic=True) for f in (total, of_tokens))
        calls["values, compiled"] = torch.no_grad()(lambda: fast_total(make()))
        calls["logps, compiled"] = torch.no_grad()(lambda: fast_tokens(make(), tokens))
        calls["token log-probs and gradient, compiled"] = lambda: differentiate(fast_tokens)
    return calls


def rows_of(numbers: dict[str, Numbers]) -> list[list[str]]:
    """Return the rows of the table: milliseconds of a tile and its reduction, and the speed relative to the tile's."""
    head = numbers[HEAD]["seconds"]
    return [
        [name, f"{1e3 * one['seconds']:.2f}", f"{1e3 * one['least']:.2f}", f"{head / one['seconds']:.3f}"]
        for name, one in numbers.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--elements", type=int, help="logits of a tile; default: those of extraction on the device")
    parser.add_argument("--compile", metavar="BACKEND", help="also time compiled reductions, e.g. inductor")
    add_options(parser, shape="small", pairs=None)
    args = parser.parse_args()
    import torch

    from prefdistill.models.device import default_device
    from prefdistill.models.logprobs import TILE_ELEMENTS

    harness.clock = harness.CLOCKS[args.clock]
    if args.threads:
        torch.set_num_threads(args.threads)
    elements = args.elements or TILE_ELEMENTS.get(default_device().type, TILE_ELEMENTS["other"])
    numbers = measure_tile(SHAPES[args.shape], args.dtype, elements, args.rounds, args.compile)
    print(f"{args.shape} in {args.dtype} on {device_name()}: a tile of {numbers[HEAD]['states']} states\n")
    print(table(["head and", "ms", "least, ms", "x head alone"], rows_of(numbers)))
    write_report(args, "reduction", reductions=numbers)


if __name__ == "__main__":
    main()
