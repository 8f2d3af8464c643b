"""Time and memory of extraction against the size of the data and of the vocabulary.

    python -m benchmarks.growth --shape tiny --pairs 64

Time should grow linearly with the data. Memory should grow neither with the data nor with the vocabulary.
"""

import argparse

from benchmarks.harness import Variant, add_options, device_name, measure_all, summary, table, write_report
from benchmarks.shapes import SHAPES

SIZES = {"1x": (1, 1), "4x data": (4, 1), "16x data": (16, 1), "4x vocabulary": (1, 4)}
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--budget", type=int, default=16_384, help="tokens in a batch")
    parser.add_argument("--kinds", default="values", help="comma-separated signal kinds")
    add_options(parser, shape="tiny", pairs=64)  # at 1x
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    variants = [
        Variant(
            name,
            "benchmarks.passes:stored",
            {
                "kinds": args.kinds.split(","),
                "shape": {**shape, "vocab_size": vocabulary * shape["vocab_size"]},
                "pairs": data * args.pairs,
                "source": args.data,
                "max_length": args.max_length,
                "dtype": args.dtype,
                "batch": 16,
                "budget": args.budget,
                "shard_rows": args.pairs,  # 1, 4 and 16 shards of data
            },
        )
        for name, (data, vocabulary) in SIZES.items()
    ]
    # one after another, so that the memory of one does not depend on the others
    measurements = measure_all(args, variants, warmup=0, together=False)
    rows, base = [], measurements["1x"]
    for name, one in measurements.items():
        if one.error:
            rows.append([name, one.error, "", "", ""])
            continue
        seconds, tokens = one.median("seconds"), one.facts["tokens"]
        above, first = (m.memory["peak"] - m.memory["loaded"] for m in (one, base))
        slower = (seconds / tokens) / (base.median("seconds") / base.facts["tokens"])
        memory = [f"{above / MIB:,.0f}", f"{above / first:.2f}"]
        rows.append([name, f"{tokens:,}", f"{tokens / seconds:,.0f}", f"{slower:.2f}", *memory])
    print(f"{args.kinds} of {args.shape} in {args.dtype} on {device_name()}, {args.pairs} pairs at 1x\n")
    header = ["size", "tokens", "tokens/s", "time per token, x", "MiB above the model", "x"]
    print(table(header, rows))
    write_report(args, "growth", variants=summary(measurements, "1x"))


if __name__ == "__main__":
    main()
