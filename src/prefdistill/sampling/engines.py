"""TODO docstring."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from prefdistill.core.errors import UserError
from prefdistill.core.progress import Progress
from prefdistill.data.encode import (
    end_token_ids,
)
from prefdistill.models.vocabulary import check_ids
from prefdistill.sampling.options import SampleRequest, Sampling

if TYPE_CHECKING:
    pass


# Prompts (token ids), the most new tokens of each, a seed -> the new tokens of n responses per prompt, consecutive,
# which may go on after an end token.
_Engine = Callable[[list[list[int]], list[int], int, Progress], list[list[int]]]


class _NotFinite(Exception):
    def __init__(self, prompt: int) -> None:
        super().__init__(prompt)
        self.prompt = prompt


class _Finite(LogitsProcessor):
    """Stops at logits from which nothing can be drawn, where generation goes on with any token. -inf is a fair one."""

    def __init__(self, prompts: list[int]) -> None:
        self.prompts = prompts

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        highest = scores.amax(-1)  # not a number where any is not
        if not bool(torch.isfinite(highest).all()):
            raise _NotFinite(self.prompts[int((~torch.isfinite(highest)).nonzero()[0])])
        return scores


def _transformers(model: Any, tokenizer: Any, settings: Sampling) -> _Engine:
    drawing = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": settings.top_p}
    ends = sorted(end_token_ids(tokenizer))

    @torch.no_grad()
    def generate(prompts: list[list[int]], limits: list[int], seed: int, progress: Progress) -> list[list[int]]:
        asked = [prompt for prompt in range(len(prompts)) for _ in range(settings.n)]
        order = sorted(range(len(asked)), key=lambda place: -len(prompts[asked[place]]))
        found: dict[int, list[int]] = {}
        check_ids(max(map(max, prompts), default=0), model, tokenizer)
        devices = [model.device] if model.device.type == "cuda" else []
        with _no_habits(model), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            for start in range(0, len(order), settings.batch_size):
                places = order[start : start + settings.batch_size]
                ids = [prompts[asked[place]] for place in places]
                batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
                out = model.generate(
                    **batch.to(model.device),
                    **(drawing if settings.temperature > 0 else {"do_sample": False}),
                    max_new_tokens=max(limits[asked[place]] for place in places),
                    eos_token_id=ends,
                    pad_token_id=tokenizer.pad_token_id,
                    use_cache=True,
                    logits_processor=LogitsProcessorList([_Finite([asked[place] for place in places])]),
                )
                found.update(zip(places, out[:, batch["input_ids"].shape[1] :].tolist(), strict=True))
                progress.update(len(places))
        return [found[place] for place in range(len(asked))]

    return generate


@contextmanager
def _no_habits(model: Any) -> Iterator[None]:
    """Without the generation settings a model comes with, such as a repetition penalty or min_p."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _vllm(model: str, tokenizer: Any, settings: SampleRequest) -> _Engine:
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise UserError("vLLM is not installed: `pip install vllm`, or take the engine transformers") from error
    # "vllm": with its own neutral settings, not those that the model comes with
    llm = LLM(
        model=model,
        tokenizer=tokenizer.name_or_path or model,
        dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
        seed=settings.seed,
        generation_config="vllm",
    )
    ends = sorted(end_token_ids(tokenizer))

    def generate(prompts: list[list[int]], limits: list[int], seed: int, progress: Progress) -> list[list[int]]:
        # Prompts with one seed would share their random numbers; vLLM counts on from it for the n of a prompt.
        params = [
            SamplingParams(
                n=settings.n,
                temperature=settings.temperature,
                top_p=settings.top_p,
                max_tokens=limit,
                seed=seed + place * settings.n,
                stop_token_ids=ends,
                ignore_eos=True,  # what ends a response is said above; the engine may have read another token
                detokenize=False,
            )
            for place, limit in enumerate(limits)
        ]
        found = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        progress.update(len(prompts) * settings.n)
        return [list(answer.token_ids) for request in found for answer in request.outputs]

    return generate
