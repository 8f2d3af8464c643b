"""Extract signals from a served teacher: what can be computed from log-probabilities that a server returns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from prefdistill.core.errors import UserError
from prefdistill.core.progress import Progress
from prefdistill.data.encode import encode_pairs
from prefdistill.data.truncation import Truncation
from prefdistill.models.load import load_tokenizer
from prefdistill.models.options import Calling
from prefdistill.signals.kinds import Settings, Tile, check_finite
from prefdistill.signals.options import ExtractRequest
from prefdistill.signals.prompt_logprobs import BYTES_PER_TOKEN, ServedTeacher, State, TeacherEndpoint, connect
from prefdistill.signals.request import TOKENS_AT_MOST, Encoding, read_data, request_of
from prefdistill.signals.store import Signals
from prefdistill.signals.topk import TopKRequest

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IMPOSSIBLE = -9_999.0  # what servers write for a log-probability of -inf, which JSON cannot hold
ROUNDING = 1e-3  # by which log-probabilities may exceed 0, and probabilities sum to more than 1


class ServedTile(Tile):
    """What a server returned of the states of one response; there are no logits."""

    def __init__(self, states: Sequence[State], tokens: Sequence[int], head_rows: int) -> None:
        self.states, self.head_rows, self.inputs = states, head_rows, {}
        self.tokens = torch.tensor(tokens)
        logps = [state[token] for state, token in zip(states, tokens, strict=True)]
        self.token_logps = torch.tensor([x if x > IMPOSSIBLE else -np.inf for x in logps], dtype=torch.float32)

    def likeliest(self, k: int, mass: float | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `models.logprobs.likeliest` does; the rest is 1 less the kept mass, so it is exact to 1e-7."""
        shape = (len(self.states), k)
        ids, logps = np.full(shape, -1, np.int32), np.full(shape, -np.inf, np.float32)
        rest = np.empty(len(self.states), np.float32)
        for i, state in enumerate(self.states):
            if len(state) < k:
                raise UserError(
                    f"the server gives {len(state)} tokens of a state, and {k} are asked for; give a lower --k"
                )
            top = sorted(state.items(), key=lambda item: -item[1])[:k]
            top = [(token, logp) for token, logp in top if logp > IMPOSSIBLE]
            probabilities = np.exp([logp for _, logp in top])
            if probabilities.sum() > 1 + ROUNDING:
                raise UserError(
                    "what the server returns are no log-probabilities: their probabilities sum to more than 1; start "
                    "vLLM with --logprobs-mode raw_logprobs, its default"
                )
            if mass is not None:
                count = int((probabilities.cumsum() - probabilities < mass).sum())
                top, probabilities = top[:count], probabilities[:count]
            ids[i, : len(top)], logps[i, : len(top)] = zip(*top, strict=True)
            with np.errstate(divide="ignore"):
                rest[i] = np.log1p(-min(1.0, probabilities.sum()))
        if ids.max(initial=0) >= self.head_rows:
            raise UserError(
                f"the server gives the token id {ids.max():,}, and the tokenizer has {self.head_rows:,}: name that of "
                "the served model with --tokenizer"
            )
        return torch.from_numpy(ids), torch.from_numpy(logps), torch.from_numpy(rest)


@dataclass(frozen=True)
class ServedExtraction(Encoding):
    """An extraction whose model is behind an endpoint."""

    teacher: ServedTeacher

    @classmethod
    def load(
        cls,
        model: "PreTrainedModel | str",
        data: "Dataset | str",
        tokenizer: "PreTrainedTokenizerBase | None",
        options: ExtractRequest,
        truncation: Truncation,
        ids_from: Signals | None,
    ) -> "ServedExtraction":
        """Load the data, and ask the server for an example.

        Raises:
            UserError: as `Extraction.load`, or if the server cannot give the signals.
        """
        if not isinstance(model, str):
            raise UserError("the engine openai asks a server for a model by its name: give the name there")
        if ids_from is not None:
            raise UserError("a server gives no log-probabilities at the ids of another store; leave ids_from out")
        assert options.base_url is not None
        source = read_data(data, options)
        tokenizer = tokenizer or load_tokenizer(model, trust_remote_code=options.trust_remote_code)
        first = encode_pairs(source.data, tokenizer, truncation, responses=options.responses, rows=range(1))[0]
        vocabulary = tokenizer.get_vocab().values()
        topk: dict[str, Any] = {}
        if "topk" in options.kinds:
            topk_request = TopKRequest(options.k, options.p, None, options.topk_coding)
            topk = topk_request.manifest(len(set(vocabulary)), max(vocabulary) + 1)
        k = min(topk["k"], topk["vocabulary"]) if topk else 0
        most = (truncation.max_length or TOKENS_AT_MOST) * (k + 2) * BYTES_PER_TOKEN
        calling = options.part(Calling)
        endpoint = TeacherEndpoint(options.base_url, model, **calling, max_bytes=max(1 << 20, most))
        teacher = connect(endpoint, tokenizer, _text(first, options.responses), k)
        settings = Settings(options.positions, options.value_dtype, options.value_temperature, topk)
        identity = {"name": model, "served": {"model": model, "form": teacher.form.name}}
        request = request_of(options, settings, identity, tokenizer, source, truncation)
        return cls(tokenizer, source.data, truncation, settings, None, request, teacher)

    def scores(self, rows: "Dataset", progress: Progress) -> dict[str, list[Any]]:
        kinds, responses = self.kinds, self.responses
        places = [(i, name) for i in range(len(rows)) for name in responses]
        prompts = rows["prompt_ids"][:]
        ids = {name: rows[f"{name}_ids"][:] for name in responses}
        ended = {name: rows[f"{name}_ended"][:] for name in responses}
        columns: dict[str, list[Any]] = {
            f"{name}_{column}": [None] * len(rows) for name in responses for kind in kinds for column in kind.collected
        }
        head_rows = max(self.tokenizer.get_vocab().values()) + 1

        def record(number: int, states: list[State]) -> None:
            i, name = places[number]
            tile = ServedTile(states[len(prompts[i]) :], ids[name][i], head_rows)
            for kind in kinds:
                parts = [part.numpy() for part in kind.reduce(tile)]
                for column, value in kind.collect(parts, ended[name][i]).items():
                    columns[f"{name}_{column}"][i] = value
            progress.update()

        self.teacher.score([prompts[i] + ids[name][i] for i, name in places], record)
        check_finite(kinds, columns, rows["row"][:])
        return columns


def _text(rows: "Dataset", responses: tuple[str, ...]) -> list[int]:
    """Return the ids of the first prompt with its first response; of any tokens if that row is dropped."""
    return [*rows[0]["prompt_ids"], *rows[0][f"{responses[0]}_ids"]] if len(rows) else [0, 0]
