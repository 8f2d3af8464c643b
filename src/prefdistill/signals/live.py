"""Signals computed from a loaded model, with the interface and the numbers of a store."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from prefdistill.core.errors import UserError
from prefdistill.core.progress import Progress
from prefdistill.data.columns import SIDES
from prefdistill.data.truncation import Truncation
from prefdistill.signals.needs import Need
from prefdistill.signals.options import SignalRequest
from prefdistill.signals.request import Extraction, check_request, finished_manifest
from prefdistill.signals.shards import memory_shard
from prefdistill.signals.store import Signals

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LiveTeacher(Signals):
    """A loaded model in place of a signal store, for small jobs and tests.

    The signals are computed once, when they are first read, as `extract_signals` computes them, and stay in memory.
    The numbers are those of a store. What is not given is taken from the trainer that gets it, and from what its
    method needs.

    Args:
        model: the loaded model.
        role: "teacher", "teacher_reference", "reference" (the student's start) or "student".
        kinds: default: those that the method needs from this role.
        dataset, tokenizer, truncation: default: those of the trainer.
        ids_from: as for `extract_signals`; default: the teacher's signals that the trainer has.
        options: other fields of `SignalRequest`: value_temperature, k, p, topk_coding, responses, bf16, ...

    Example:
        >>> PrefDistillTrainer(model, METHODS["tvkd"](), args, pairs,                       # doctest: +SKIP
        ...     [LiveTeacher(teacher), LiveTeacher(model, role="reference")], tokenizer)
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        role: str = "teacher",
        kinds: Sequence[str] | None = None,
        *,
        dataset: "Dataset | None" = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        truncation: Truncation | None = None,
        ids_from: Signals | None = None,
        **options: Any,
    ) -> None:
        self._model, self._role, self._kinds, self._options = model, role, kinds, options
        self._dataset, self._tokenizer, self._truncation = dataset, tokenizer, truncation
        self._ids_from = ids_from

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "manifest" in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if self._dataset is None or self._tokenizer is None or self._kinds is None:
            raise UserError("this LiveTeacher is not bound to data yet: give it dataset, tokenizer and kinds")
        bound = self.bind()
        super().__init__(bound.manifest, bound.shards)
        self.tokenizer = bound.tokenizer
        return getattr(self, name)

    def bind(
        self,
        dataset: "Dataset | None" = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        truncation: Truncation | None = None,
        needs: Iterable[Need] = (),
        others: Sequence[Signals] = (),
    ) -> Signals:
        """Compute the signals of a data set; arguments fill in what the constructor was not given.

        Args:
            dataset, tokenizer, truncation: of the trainer.
            needs: of the method.
            others: the trainer's other signals, which may hold the token ids to score at.
        """
        own_needs = [need for need in needs if need.role == self._role]
        kinds = tuple(self._kinds or dict.fromkeys(need.kind for need in own_needs))
        if not kinds:
            raise UserError(f"the method needs no signals of the {self._role}; leave this LiveTeacher out")
        needed = {name: value for need in own_needs for name, value in need.settings.items()}
        responses = tuple(dict.fromkeys(name for need in own_needs for name in need.responses)) or SIDES
        options = {"responses": responses, **needed, **self._options}
        request = SignalRequest.checked("LiveTeacher", kinds=kinds, role=self._role, **options)
        ids_from = self._ids_from
        if ids_from is None and "topk" in kinds and self._role != "teacher":
            ids_from = next((s for s in others if s.role == "teacher" and "topk" in s.kinds), None)
        check_request(request, ids_from, self._model)
        tokenizer = self._tokenizer if self._tokenizer is not None else tokenizer
        dataset = self._dataset if self._dataset is not None else dataset
        if dataset is None:
            raise UserError("this LiveTeacher is not bound to data yet: give it a dataset")
        truncation = self._truncation or truncation or Truncation()
        extraction = Extraction.load(self._model, dataset, tokenizer, request, truncation, ids_from)
        total = len(responses) * len(dataset)
        with Progress(f"signals ({self._role})", total, "response") as progress:
            shards = [memory_shard(*extraction.shard(part, progress)) for part in extraction.parts]
        manifest, _ = finished_manifest(extraction.request, shards)
        signals = Signals(manifest, shards)
        signals.tokenizer = tokenizer
        return signals


def bind_live(
    signals: Sequence[Signals],
    dataset: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    truncation: Truncation | None,
    needs: Iterable[Need],
) -> list[Signals]:
    """Return stores as they are, and each `LiveTeacher` with its signals computed for a data set."""
    bound = [store for store in signals if not isinstance(store, LiveTeacher)]
    if truncation is None and bound:
        own = [store for store in bound if store.is_read_with(tokenizer)] or bound
        truncation = Truncation(**own[0].manifest["truncation"])
    live = [store for store in signals if isinstance(store, LiveTeacher)]
    for teacher in sorted(live, key=lambda one: one._role != "teacher"):  # the others are scored at its ids
        bound.append(teacher.bind(dataset, tokenizer, truncation, needs, bound))
    return bound
