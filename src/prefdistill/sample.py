"""Responses from a model: transformers' own batched generation."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from prefdistill.encode import end_token_ids
from prefdistill.errors import UserError
from prefdistill.progress import Progress


@dataclass(frozen=True)
class Response:
    text: str
    tokens: int
    ended: bool


@torch.no_grad()
def sample(
    model: Any,
    tokenizer: Any,
    prompts: list[Any],
    *,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    seed: int = 0,
    what: str = "sampling",
) -> list[Response]:
    """One response per prompt, in the order of the prompts.

    Args:
        model: a causal language model, on its device, in eval mode.
        tokenizer: its tokenizer.
        prompts: messages (through the chat template) or plain text, each.
        temperature: of the whole vocabulary's distribution, nothing cut off; 0 is greedy.
        max_new_tokens: a response that has not ended by then is returned as it is, with `ended=False`.
        batch_size: prompts of like length generated together.
        seed: of the draws; the same seed, prompts and batch size give the same responses on the same machine.
        what: name on the progress bar.
    """
    if temperature < 0:
        raise UserError(f"temperature must be 0 (greedy) or more, got {temperature}")
    ids = [_prompt_ids(tokenizer, prompt) for prompt in prompts]
    ends = sorted(end_token_ids(tokenizer))
    drawing = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    found: dict[int, Response] = {}
    devices = [model.device] if model.device.type == "cuda" else []
    with (
        _no_habits(model),
        torch.random.fork_rng(devices=devices),
        Progress(what, len(ids), "response") as progress,
    ):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            batch = tokenizer.pad({"input_ids": [ids[i] for i in places]}, padding_side="left", return_tensors="pt")
            out = model.generate(
                **batch.to(model.device),
                **(drawing if temperature > 0 else {"do_sample": False}),
                max_new_tokens=max_new_tokens,
                eos_token_id=ends,
                pad_token_id=tokenizer.pad_token_id,
                use_cache=True,
            )
            for place, new in zip(places, out[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                stop = next((n for n, token in enumerate(new) if token in ends), None)
                body = new if stop is None else new[:stop]
                text = tokenizer.decode(body, skip_special_tokens=True)
                found[place] = Response(text, len(body) + (stop is not None), stop is not None)
            progress.update(len(places))
    return [found[i] for i in range(len(ids))]


@contextmanager
def _no_habits(model: Any) -> Iterator[None]:
    """Without the generation settings a model comes with, such as a repetition penalty or min_p."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _prompt_ids(tokenizer: Any, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
