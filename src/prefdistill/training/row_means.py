"""Give every row of a batch the same weight in TRL's trainers, which give every micro-batch the same."""

from typing import Any

from torch import Tensor, nn


def with_row_means(trainer_class: type[Any]) -> type[Any]:
    """Return a subclass of one of TRL's trainers whose gradient and log are means over the rows of the whole batch.

    A loss that is a mean over the tokens of the whole batch already, as that of SFT, is left as it is. So are rows that
    are repeated to fill up the last batches of several processes: they count, as in TRL.
    """

    class RowMeans(trainer_class):
        def get_batch_samples(self, *args: Any, **options: Any) -> tuple[list[Any], Any]:
            batches, items = super().get_batch_samples(*args, **options)
            self._rows_of_step = [_rows(batch) for batch in batches]
            return batches, items

        def compute_loss(
            self,
            model: nn.Module,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Tensor | int | None = None,
        ) -> Any:
            mean_rows = sum(self._rows_of_step) / len(self._rows_of_step)
            share = _rows(inputs) / mean_rows  # TRL divides by the number of micro-batches
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if num_items_in_batch is not None or share == 1:
                return result
            for name, values in self._metrics["train"].items():
                if name != "num_tokens":  # which is a total
                    values[-1] *= share
            return (result[0] * share, result[1]) if return_outputs else result * share

    RowMeans.__name__ = RowMeans.__qualname__ = trainer_class.__name__
    return RowMeans


def _rows(batch: dict[str, Any]) -> int:
    return len(batch["input_ids"])
