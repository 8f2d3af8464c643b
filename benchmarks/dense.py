"""Reference implementation of distillation: all logits of the student, full distributions of the teacher, no tiles.

The teacher's distributions are on disk, 2 bytes per token of the vocabulary, one file per response.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments

from prefdistill.data.encode import encode_pairs
from prefdistill.data.truncation import Truncation

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def write_distributions(
    model: "PreTrainedModel",
    data: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    truncation: Truncation,
    out: Path,
    responses: Sequence[str],
) -> int:
    """Write log-probabilities of the full vocabulary at every state of the responses; return their bytes."""
    rows, _ = encode_pairs(data, tokenizer, truncation, responses=("chosen", "rejected", "student_response"))
    written = 0
    (out / "dense").mkdir(parents=True, exist_ok=True)
    for row in rows:
        for name in responses:
            prompt, response = row["prompt_ids"], row[f"{name}_ids"]
            logits = model(torch.tensor([prompt + response], device=model.device)).logits[0, len(prompt) - 1 : -1]
            logps = logits.float().log_softmax(-1).half().cpu().numpy()
            np.save(out / "dense" / f"{row['row']}.{name}.npy", logps)
            written += logps.nbytes
    return written


class DenseTrainer(Trainer):
    """Train DCKD (on chosen and rejected) or ADPA (on the student's response), written directly from the equations."""

    def __init__(
        self,
        model: "PreTrainedModel",
        method: str,
        args: TrainingArguments,
        data: "Dataset",
        tokenizer: "PreTrainedTokenizerBase",
        truncation: Truncation,
        directory: Path,
    ) -> None:
        self.method = method
        self.responses = ("chosen", "rejected") if method == "dckd" else ("chosen", "student_response")
        distilled = self.responses if method == "dckd" else self.responses[1:]
        roles = ("teacher",) if method == "dckd" else ("teacher", "teacher_reference")
        data, _ = encode_pairs(data, tokenizer, truncation, responses=self.responses)

        def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
            pairs = [(row["prompt_ids"], row[f"{name}_ids"]) for name in self.responses for row in rows]
            texts = [torch.tensor([*prompt, *response]) for prompt, response in pairs]
            dense = {
                (role, name): [_distribution(directory / role, row["row"], name) for row in rows]
                for role in roles
                for name in distilled
            }
            return {
                "input_ids": pad_sequence(texts, batch_first=True, padding_value=tokenizer.pad_token_id),
                "attention_mask": pad_sequence([torch.ones_like(text) for text in texts], batch_first=True),
                "states": [slice(len(prompt) - 1, len(prompt) + len(response) - 1) for prompt, response in pairs],
                "dense": dense,
            }

        args.remove_unused_columns = False
        super().__init__(model=model, args=args, data_collator=collate, train_dataset=data, processing_class=tokenizer)
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        ids, states = inputs["input_ids"], inputs["states"]
        logps = model(input_ids=ids, attention_mask=inputs["attention_mask"]).logits.float().log_softmax(-1)
        tokens = logps[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        count = len(states) // 2
        loss = sum(-tokens[i, states[i]].mean() for i in range(count)) / count
        for (role, name), distributions in inputs["dense"].items():
            if role != "teacher":
                continue
            for i, teacher in enumerate(distributions):
                row = self.responses.index(name) * count + i
                student = logps[row, states[row]]
                if self.method == "dckd":
                    loss = loss + (teacher.exp() * (teacher - student)).sum(-1).mean() / count
                else:
                    advantage = teacher - inputs["dense"]["teacher_reference", name][i]
                    loss = loss - (student.exp() * advantage).sum(-1).mean() / count
        return loss


def _distribution(directory: Path, row: int, response: str) -> Tensor:
    return torch.from_numpy(np.load(directory / "dense" / f"{row}.{response}.npy")).float()
