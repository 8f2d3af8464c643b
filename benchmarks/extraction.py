"""Cost of signal extraction, compared with a bare forward, a naive implementation and the backbone alone.

    python -m benchmarks.extraction --shape small --pairs 32 --data ../shared/data/alpacaeval_pairs/train.jsonl.gz

Tokens are those of the pairs, with a prompt counted once per response; padding that a variant adds, or prompts that it
shares, show in its time. MFU counts the head only at the states of responses, and is given for GPUs.
"""

import argparse

from benchmarks.harness import (
    Variant,
    add_options,
    device_name,
    gib,
    measure_all,
    ratio_text,
    ratios,
    summary,
    table,
    write_report,
)  # fmt: skip
from benchmarks.shapes import SHAPES, peak_flops

BASELINE = "bare forward, padded"
LIMIT = "backbone alone"


def variants(args: argparse.Namespace) -> list[Variant]:
    common = {
        "shape": SHAPES[args.shape],
        "pairs": args.pairs,
        "source": args.data,
        "max_length": args.max_length,
        "dtype": args.dtype,
        "batch": args.batch,
        "budget": args.budget,
    }

    def variant(name: str, function: str, **options: object) -> Variant:
        return Variant(name, f"benchmarks.passes:{function}", {**options, **common})

    all_variants = [
        variant(BASELINE, "bare", grouped=False),
        variant("bare forward, by length", "bare", grouped=True),
        variant("naive top-50 as JSON", "naive", k=50),
        variant(LIMIT, "backbone", head=False),
        variant("backbone and head", "backbone", head=True),
        variant("endpoints", "in_memory", kinds=["values"], positions="endpoints"),
        variant("values", "in_memory", kinds=["values"]),
        variant("logps", "in_memory", kinds=["logps"]),
        variant("top-50", "in_memory", kinds=["topk"]),
        variant("endpoints, stored", "stored", kinds=["values"], positions="endpoints"),
        variant("values, stored", "stored", kinds=["values"]),
        variant("top-50, stored", "stored", kinds=["topk"]),
    ]
    chosen = args.variants.split("|") if args.variants else [v.name for v in all_variants]
    return [v for v in all_variants if v.name in {BASELINE, LIMIT, *chosen}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=16, help="sequences per batch of the padded variants")
    parser.add_argument("--budget", type=int, default=16_384, help="tokens per batch of the other variants")
    parser.add_argument("--variants", help="only these, separated by |, plus the baseline and the limit")
    add_options(parser, shape="small", pairs=64)
    args = parser.parse_args()
    measurements = measure_all(args, variants(args))
    facts = next(one.facts for one in measurements.values() if one.facts)
    peak = peak_flops(device_name())
    rows = []
    for name, one in measurements.items():
        seconds, disk = one.median("seconds"), one.median("disk")
        base, limit = (ratios(measurements, reference, name) for reference in (BASELINE, LIMIT))
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
        f"({facts['response_tokens']:,} in responses), model {gib(facts['bytes'])} GiB\n"
    )
    header = ["variant", "tokens/s", "x bare padded", "x backbone", "GiB above the model", "bytes/token", "MFU"]
    print(table(header, rows))
    write_report(args, "extraction", variants=summary(measurements, BASELINE))


if __name__ == "__main__":
    main()
