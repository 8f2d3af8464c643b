"""The shapes of public data sets: the columns by which each is known, and how they give prompt, chosen and rejected."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from prefdistill.core.errors import UserError
from prefdistill.data.columns import SIDES
from prefdistill.data.messages import as_messages, is_conversation

Row = dict[str, Any]
PAIR = ("prompt", *SIDES)
# Why a row of a shape is left out.
NO_PREFERENCE = "neither response is preferred"
OTHER_TURNS = "the two conversations differ before their last turn"
NO_RESPONSE = "a response is missing"


class LeftOut(Exception):
    """A row of a public shape holds no pair; the argument is the reason."""


class Shape(NamedTuple):
    """A public shape: what it is known as, the columns it is recognised by, those it gives, and how."""

    name: str
    needs: tuple[str, ...]
    gives: tuple[str, ...]
    read: Callable[[Row], Row]


def _renamed(name: str, **columns: str) -> Shape:
    others = tuple(side for side in PAIR if side not in columns)
    return Shape(
        name, (*columns.values(), *others), tuple(columns), lambda row: {to: row[own] for to, own in columns.items()}
    )


def _alpaca_prompt(row: Row) -> str:
    return "\n".join(text for text in (row["instruction"], row["input"]) if text)


def _alpaca_list(row: Row) -> Row:
    output = row["output"]
    if not isinstance(output, list) or len(output) != 2:
        raise UserError("'output' must be a list of the chosen and the rejected response")
    return {"prompt": _alpaca_prompt(row), "chosen": output[0], "rejected": output[1]}


def _chosen_by(prompt: str, first: str, second: str, label: str, first_label: Any) -> Callable[[Row], Row]:
    def read(row: Row) -> Row:
        if row[label] not in (0, 1):
            raise UserError(f"'{label}' must be 0 or 1, not {row[label]!r}")
        own = (first, second) if row[label] == first_label else (second, first)
        return {"prompt": row[prompt], "chosen": row[own[0]], "rejected": row[own[1]]}

    return read


def _chosen_by_strength(prompt: str, first: str, second: str, strength: str) -> Callable[[Row], Row]:
    """Read a preference from -3, the first is much better, to 3, the second is."""

    def read(row: Row) -> Row:
        if not isinstance(row[strength], int | float):
            raise UserError(f"'{strength}' must be a number, not {row[strength]!r}")
        if row[strength] == 0:
            raise LeftOut(NO_PREFERENCE)
        own = (first, second) if row[strength] < 0 else (second, first)
        return {"prompt": row[prompt], "chosen": row[own[0]], "rejected": row[own[1]]}

    return read


def _arena(row: Row) -> Row:
    """Read two whole conversations with models; those of several turns share no prompt, since the answers differ."""
    if row["winner"] not in ("model_a", "model_b"):
        raise LeftOut(NO_PREFERENCE)
    names = ("a", "b") if row["winner"] == "model_a" else ("b", "a")
    chosen, rejected = (as_messages(row[f"conversation_{name}"]) or [] for name in names)
    if not chosen or chosen[:-1] != rejected[:-1]:
        raise LeftOut(OTHER_TURNS)
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _arena_texts(row: Row) -> Row:
    """Read the turns of prompts and of two models, each a JSON list of texts."""
    if row["winner_model_a"] == row["winner_model_b"]:
        raise LeftOut(NO_PREFERENCE)
    names = ("response_a", "response_b") if row["winner_model_a"] else ("response_b", "response_a")
    values = {}
    for side, name in zip(PAIR, ("prompt", *names), strict=True):
        turns = json.loads(row[name]) if isinstance(row[name], str) else row[name]
        if not isinstance(turns, list):
            raise UserError(f"'{name}' must be a list of texts, not {row[name]!r}")
        if len(turns) != 1:
            raise LeftOut(OTHER_TURNS)
        if turns[0] is None:
            raise LeftOut(NO_RESPONSE)
        values[side] = turns[0]
    return values


# Tried in this order, for data that lack one of prompt, chosen and rejected.
SHAPES = (
    Shape(
        "Alpaca pairs",
        ("instruction", "input", *SIDES),
        ("prompt",),
        lambda row: {"prompt": _alpaca_prompt(row)},
    ),
    Shape("Alpaca with a list of outputs", ("instruction", "input", "output"), PAIR, _alpaca_list),
    _renamed("orca_dpo_pairs", prompt="question"),
    _renamed("distilabel-intel-orca-dpo-pairs", prompt="input"),
    _renamed("UltraInteract_pair", prompt="trajectory"),
    _renamed("ShareGPT pairs", prompt="conversations"),
    _renamed("instruction pairs", prompt="instruction"),
    _renamed(
        "ultrafeedback-binarized-preferences",
        prompt="instruction",
        chosen="chosen_response",
        rejected="rejected_response",
    ),
    _renamed("prompt, chosen_response, rejected_response", chosen="chosen_response", rejected="rejected_response"),
    _renamed("prompt, response_chosen, response_rejected", chosen="response_chosen", rejected="response_rejected"),
    _renamed("stack-exchange-paired", prompt="question", chosen="response_j", rejected="response_k"),
    Shape(
        "PKU-SafeRLHF",
        ("prompt", "response_0", "response_1", "better_response_id"),
        SIDES,
        _chosen_by("prompt", "response_0", "response_1", "better_response_id", 0),
    ),
    Shape(
        "SHP",
        ("history", "human_ref_A", "human_ref_B", "labels"),
        PAIR,
        _chosen_by("history", "human_ref_A", "human_ref_B", "labels", 1),
    ),
    Shape(
        "HelpSteer3",
        ("context", "response1", "response2", "overall_preference"),
        PAIR,
        _chosen_by_strength("context", "response1", "response2", "overall_preference"),
    ),
    Shape(
        "HelpSteer2's preferences",
        ("prompt", "response_1", "response_2", "preference_strength"),
        SIDES,
        _chosen_by_strength("prompt", "response_1", "response_2", "preference_strength"),
    ),
    Shape("chatbot_arena_conversations", ("conversation_a", "conversation_b", "winner"), PAIR, _arena),
    Shape(
        "arena-human-preference-55k",
        ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b"),
        PAIR,
        _arena_texts,
    ),
)
# Public data that are no pairs: the columns by which they are known, and how pairs are made of them.
NO_PAIRS = (
    (
        ("prompt", "completion", "label"),
        "These are single responses with a label (KTO): write rows of a response that is liked and one that is not, to "
        "the same prompt",
    ),
    (("prompt", "answers", "num_responses"), "These are rankings (Nectar): write a row for each pair of answers"),
    (
        ("instruction", "completions"),
        "These are rated responses (UltraFeedback): write a row for each pair of them, or use "
        "HuggingFaceH4/ultrafeedback_binarized",
    ),
    (
        ("prompt", "response", "helpfulness"),
        "These are rated responses (HelpSteer): write rows of two responses to the same prompt",
    ),
)


def shape_of(columns: Collection[str], first: Row) -> Shape | None:
    """Return the shape of data that lack a column of a pair, if one fits their columns and first row."""
    missing = {*PAIR} - {*columns}
    if not missing or "messages" in columns:
        return None
    if is_conversation(first.get("chosen")) and any(m.get("role") == "user" for m in first["chosen"]):
        return None  # whole conversations: the prompt is what they share
    return next((s for s in SHAPES if {*s.needs} <= {*columns} and missing <= {*s.gives}), None)


def pair_hint(columns: Collection[str]) -> str:
    """Return what to do with columns that are no pair."""
    usual = "A pair has `prompt`, `chosen`, `rejected`; the prompt may be the start of both others"
    return next((hint for needs, hint in NO_PAIRS if {*needs} <= {*columns}), usual) + "."
