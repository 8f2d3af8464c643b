"""Train one reward model, so that every cell and seed of a study has the same judge (`reward_model.name`).

    python studies/train_judge.py DIR PAIRS.jsonl --model NAME

`prefdistill run` trains one per seed on prompts that it holds back. PAIRS should be of prompts that no other model
sees.
"""

import argparse
from functools import partial
from pathlib import Path

from prefdistill.data.load import load_pairs
from prefdistill.models.classifiers import new_classifier
from prefdistill.models.load import load_tokenizer
from prefdistill.models.options import FromModel
from prefdistill.training.options import Training
from prefdistill.training.trl import train_reward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("pairs")
    parser.add_argument("--model", required=True)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    arguments = parser.parse_args()
    start = FromModel.model_validate({"from": arguments.model})
    training = Training(
        learning_rate=arguments.learning_rate, epochs=arguments.epochs, batch_size=8, micro_batch_size=4, bf16=True
    )
    train_reward(
        partial(new_classifier, start),
        load_pairs(arguments.pairs),
        load_tokenizer(arguments.model),
        training,
        arguments.out,
        what="judge",
    )


if __name__ == "__main__":
    main()
