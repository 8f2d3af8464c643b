"""Engines: what generates responses. A new engine is a class and its entry in `prefdistill.sampling.ENGINES`."""

import operator
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from prefdistill.core.errors import UserError
from prefdistill.core.lazy import is_installed
from prefdistill.core.memory import free_devices
from prefdistill.core.progress import Progress
from prefdistill.data.template import end_token_ids
from prefdistill.models.hub import adapter_settings, gguf_parts, pinned_revision
from prefdistill.models.load import load_model, ready
from prefdistill.models.placement import input_device
from prefdistill.models.positions import check_positions, learned_positions
from prefdistill.models.vocabulary import check_ids
from prefdistill.sampling.options import SampleRequest, Sampling


@dataclass(frozen=True)
class Part:
    """Prompts whose responses are drawn together.

    Args:
        prompts: token ids of each.
        limits: maximum new tokens of each.
        rows: of the prompts, for messages.
        seed: of the draws.
    """

    prompts: list[list[int]]
    limits: list[int]
    rows: Sequence[int]
    seed: int


class Drawn(NamedTuple):
    """The new tokens of n responses per prompt of a part, consecutive, and the seconds they took."""

    tokens: list[list[int]]
    seconds: float


class Engine(ABC):
    """Generates the tokens of responses to tokenized prompts."""

    same_draws_as: ClassVar[str | None] = None  # an engine with the same responses, whose files this one resumes
    makes_batches: ClassVar[bool] = False  # of its own, so that `batch_size` has no effect

    @classmethod
    def check(cls, model: Any, options: SampleRequest) -> None:
        """Check that the engine can run a model (loaded, or a Hub name or directory), before any data is read.

        Raises:
            UserError: if it cannot.
        """
        if options.quantization is not None and not isinstance(model, str):
            raise UserError("quantization applies to a model that is loaded by name; leave it out for one in memory")
        if options.device_map is not None and not isinstance(model, str):
            raise UserError("device_map applies to a model that is loaded by name; leave it out for one in memory")

    @classmethod
    @abstractmethod
    def open(cls, model: Any, tokenizer: Any, options: SampleRequest) -> Self:
        """Return an engine for a model, which is loaded here if it is a name."""

    @abstractmethod
    def generate(self, prompts: list[list[int]], limits: list[int], seed: int, progress: Progress) -> list[list[int]]:
        """Return the new tokens of n responses per prompt, consecutive; tokens after an end token are ignored.

        Args:
            prompts: token ids.
            limits: maximum new tokens of each prompt.
            seed: of the draws.
            progress: counts responses.

        Raises:
            NotFiniteLogits: if nothing can be drawn.
        """

    def close(self) -> None:
        """Free what the engine has loaded, also where something else still holds the engine."""
        vars(self).clear()
        free_devices()

    def draw(self, part: Part, progress: Progress) -> Drawn:
        """Return responses to a part.

        Raises:
            UserError: if nothing can be drawn; it names the row.
        """
        start = time.monotonic()
        try:
            tokens = self.generate(part.prompts, part.limits, part.seed, progress)
        except NotFiniteLogits as error:
            raise UserError(
                f"the model's logits are not finite after the prompt of row {part.rows[error.prompt]} of the data; its "
                "weights may be damaged, or its dtype too narrow: try --dtype float32"
            ) from error
        return Drawn(tokens, round(time.monotonic() - start, 3))

    def draw_all(self, parts: Sequence[Part], progress: Progress) -> Generator[tuple[int, Drawn], None, None]:
        """Yield the index of each part with responses to it, in any order: here, one part after the other."""
        for index, part in enumerate(parts):
            yield index, self.draw(part, progress)


class NotFiniteLogits(Exception):
    """The logits after a prompt are not finite.

    Args:
        prompt: its index.
    """

    def __init__(self, prompt: int) -> None:
        super().__init__(prompt)
        self.prompt = prompt


class TransformersEngine(Engine):
    """`generate` of transformers, prompts of similar length batched together.

    Args:
        model: a causal language model, on its device, in eval mode.
        tokenizer: its tokenizer.
        sampling: how to draw.
    """

    def __init__(self, model: Any, tokenizer: Any, sampling: Sampling) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling

    @classmethod
    def open(cls, model: Any, tokenizer: Any, options: SampleRequest) -> Self:
        if isinstance(model, str):
            model = load_model(
                model,
                dtype=options.dtype,
                quantization=options.quantization,
                **options.placement,
                trust_remote_code=options.trust_remote_code,
            )
        return cls(ready(model), tokenizer, options)

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], limits: list[int], seed: int, progress: Progress) -> list[list[int]]:
        model, sampling = self.model, self.sampling
        prompt_of = [prompt for prompt in range(len(prompts)) for _ in range(sampling.n)]
        by_length = sorted(range(len(prompt_of)), key=lambda place: -len(prompts[prompt_of[place]]))
        responses: dict[int, list[int]] = {}
        check_ids(max(map(max, prompts), default=0), model, self.tokenizer)
        widths = [len(ids) + limit for ids, limit in zip(prompts, limits, strict=True)]
        check_positions(max(widths, default=0), model, "prompts with their responses")
        positions = learned_positions(model)
        draws = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": sampling.top_p}
        device = input_device(model)
        devices = [device] if device.type == "cuda" else []
        with _neutral_generation_config(model), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            for places in _batches(by_length, sampling.batch_size, prompt_of, prompts, limits, positions):
                ids = [prompts[prompt_of[place]] for place in places]
                batch = self.tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
                out = model.generate(
                    **batch.to(device),
                    **(draws if sampling.temperature > 0 else {"do_sample": False}),
                    max_new_tokens=max(limits[prompt_of[place]] for place in places),
                    eos_token_id=sorted(end_token_ids(self.tokenizer)),
                    pad_token_id=self.tokenizer.pad_token_id,
                    use_cache=True,
                    logits_processor=LogitsProcessorList([_RaiseNotFinite([prompt_of[place] for place in places])]),
                )
                responses.update(zip(places, out[:, batch["input_ids"].shape[1] :].tolist(), strict=True))
                progress.update(len(places))
        return [responses[place] for place in range(len(prompt_of))]


def _batches(
    places: list[int],
    size: int,
    prompt_of: list[int],
    prompts: list[list[int]],
    limits: list[int],
    positions: int | None,
) -> Iterator[list[int]]:
    """Yield batches of places, longest prompt first; the longest prompt has positions for the highest limit."""
    batch: list[int] = []
    for place in places:
        longest = len(prompts[prompt_of[(batch or [place])[0]]])
        beyond = positions is not None and longest + limits[prompt_of[place]] > positions
        if batch and (beyond or len(batch) == size):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


class _RaiseNotFinite(LogitsProcessor):
    """Stops at logits that are not finite; `generate` would continue with any token. A single -inf is valid."""

    def __init__(self, prompts: list[int]) -> None:
        self.prompts = prompts

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        highest = scores.amax(-1)  # NaN if any is
        if not bool(torch.isfinite(highest).all()):
            raise NotFiniteLogits(self.prompts[int((~torch.isfinite(highest)).nonzero()[0])])
        return scores


@contextmanager
def _neutral_generation_config(model: Any) -> Iterator[None]:
    """Disable the model's own generation settings, such as a repetition penalty or min_p, inside the block."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class VLLMEngine(Engine):
    """vLLM, which loads the model itself. It gets and returns token ids."""

    makes_batches = True
    OWN = ("model", "tokenizer", "dtype", "trust_remote_code", "seed", "generation_config")  # arguments set here

    def __init__(self, llm: Any, tokenizer: Any, sampling: Sampling) -> None:
        self.llm, self.tokenizer, self.sampling = llm, tokenizer, sampling

    @classmethod
    def check(cls, model: Any, options: SampleRequest) -> None:
        if not isinstance(model, str):
            raise UserError("vLLM loads a model itself: give its Hub name or directory, or use the engine transformers")
        if not is_installed("vllm"):
            raise UserError("vLLM is not installed: `pip install vllm`, or use the engine transformers")
        if own := sorted(set(cls.OWN).intersection(options.vllm)):
            raise UserError(f"vllm={{{own[0]}: ...}}: that is decided by prefdistill's own options; leave it out")
        if adapter_settings(model) is not None:
            raise UserError(
                f"{model} is an adapter and vLLM loads whole models: save it merged, or use the engine transformers"
            )
        if gguf_parts(model):
            raise UserError(f"{model} is a GGUF file: use the engine transformers, which dequantises it")

    @classmethod
    def open(cls, model: Any, tokenizer: Any, options: SampleRequest) -> Self:
        from vllm import LLM

        free_devices()
        arguments = {
            "model": model,
            "revision": pinned_revision(model),
            "tokenizer": tokenizer.name_or_path or model,
            "tokenizer_revision": pinned_revision(tokenizer.name_or_path or model),
            "dtype": options.dtype,
            "trust_remote_code": options.trust_remote_code,
            "seed": options.seed,
            "generation_config": "vllm",  # vLLM's neutral settings instead of the model's own
            "max_model_len": -1,  # as many tokens as the model has positions and the cache has room for
        }
        # The LLM has no name here: the first import of vLLM keeps this frame alive, and so what its names refer to.
        return cls(LLM(**(arguments | options.vllm)), tokenizer, options)

    def draw_all(self, parts: Sequence[Part], progress: Progress) -> Generator[tuple[int, Drawn], None, None]:
        lengths = (
            (len(ids) + limit, row)
            for part in parts
            for row, ids, limit in zip(part.rows, part.prompts, part.limits, strict=True)
        )
        longest, row = max(lengths, key=operator.itemgetter(0), default=(0, 0))
        room = self.llm.model_config.max_model_len
        if longest > room:  # vLLM would cut the response short
            raise UserError(
                f"row {row} of the data has up to {longest:,} tokens with its response, and vLLM has room for "
                f"{room:,}: give a lower --max-new-tokens, a --max-length, or vLLM more memory"
            )
        yield from super().draw_all(parts, progress)

    def generate(self, prompts: list[list[int]], limits: list[int], seed: int, progress: Progress) -> list[list[int]]:
        from vllm import SamplingParams

        sampling = self.sampling
        # prompts with one seed would share their random numbers; vLLM adds 0 .. n-1 to it for the n of a prompt
        params = [
            SamplingParams(
                n=sampling.n,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=limit,
                seed=seed + place * sampling.n,
                stop_token_ids=sorted(end_token_ids(self.tokenizer)),
                ignore_eos=True,  # `stop_token_ids` decides; the engine may have read another end token
                detokenize=False,
            )
            for place, limit in enumerate(limits)
        ]
        requests = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        progress.update(len(prompts) * sampling.n)
        return [list(output.token_ids) for request in requests for output in request.outputs]
