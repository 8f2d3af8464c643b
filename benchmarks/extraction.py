"""What a teacher's pass costs, beside a bare forward, the plain way and the backbone alone.

    python -m benchmarks.extraction --shape small --pairs 32 --data ../shared/data/alpacaeval_pairs/train.jsonl.gz

Tokens are those of the pairs, a prompt counted once for each response; what a way adds to them as padding, or saves by
sharing prompts, shows in its time. MFU counts the head at the states of responses alone, and is given for GPUs.
"""

import argparse

from benchmarks.harness import (
    Variant,
    add_options,
    device_name,
    gib,
    measure,
    ratio_text,
    ratios,
    summary,
    table,
    write_report,
)
from benchmarks.shapes import SHAPES, peak_flops

BASELINE = "bare forward, padded"
LIMIT = "backbone alone"


def variants(args: argparse.Namespace) -> list[Variant]:
    given = {
        "shape": SHAPES[args.shape],
        "pairs": args.pairs,
        "source": args.data,
        "max_length": args.max_length,
        "dtype": args.dtype,
        "batch": args.batch,
        "budget": args.budget,
    }

    def way(name: str, function: str, **options: object) -> Variant:
        return Variant(name, f"benchmarks.passes:{function}", {**options, **given})

    all_ways = [
        way(BASELINE, "bare", grouped=False),
        way("bare forward, by length", "bare", grouped=True),
        way("naive top-50 as JSON", "naive", k=50),
        way(LIMIT, "backbone", head=False),
        way("backbone and head", "backbone", head=True),
        way("endpoints", "ours", kinds=["values"], positions="endpoints"),
        way("values", "ours", kinds=["values"]),
        way("logps", "ours", kinds=["logps"]),
        way("top-50", "ours", kinds=["topk"]),
        way("endpoints, stored", "stored", kinds=["values"], positions="endpoints"),
        way("values, stored", "stored", kinds=["values"]),
        way("top-50, stored", "stored", kinds=["topk"]),
    ]
    chosen = args.variants.split("|") if args.variants else [v.name for v in all_ways]
    return [v for v in all_ways if v.name in {BASELINE, LIMIT, *chosen}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument(
        "--data", help="a .jsonl(.gz) file of real pairs, whose lengths are taken; default: a fit to some"
    )
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=16, help="sequences in a batch of the padded ways")
    parser.add_argument("--budget", type=int, default=16_384, help="tokens in a batch of ours")
    parser.add_argument("--variants", help="only these, with | between them, beside the baseline and the limit")
    add_options(parser)
    args = parser.parse_args()
    ways = variants(args)
    found = measure(ways, rounds=args.rounds, threads=args.threads, timed_by=args.clock, together=not args.sequential)
    facts = next(one.facts for one in found.values() if one.facts)
    peak = peak_flops(device_name())
    rows = []
    for name, one in found.items():
        seconds, disk = one.median("seconds"), one.median("disk")
        base, limit = (ratios(found, reference, name) for reference in (BASELINE, LIMIT))
        above = one.memory["peak"] - one.memory["loaded"] if one.memory else None
        rows.append(
            [
                name,
                f"{facts['tokens'] / seconds:,.0f}" if seconds else one.error or "",
                ratio_text(base),
                ratio_text(limit),
                gib(above),
                f"{disk / facts['response_tokens']:,.1f}" if disk else "",
                f"{facts['flops'] / seconds / peak:.0%}" if peak and seconds else "",
            ]
        )
    print(
        f"{args.shape} in {args.dtype} on {device_name()}: {args.pairs} pairs, {facts['tokens']:,} tokens "
        f"({facts['response_tokens']:,} of responses), model {gib(facts['bytes'])} GiB\n"
    )
    header = ["way", "tokens/s", "x bare padded", "x backbone", "GiB above the model", "bytes/token", "MFU"]
    print(table(header, rows))
    write_report(args, "extraction", variants=summary(found, BASELINE))


if __name__ == "__main__":
    main()
