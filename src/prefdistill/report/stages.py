"""What the stages of a run read and took: rows, templates, what teacher and student share; time, memory and disk."""

import math
from typing import Any

from prefdistill.core.text import size
from prefdistill.evaluation.results import Results, clean, mapping, number
from prefdistill.report.format import cut, duration, form_text
from prefdistill.signals.projection import SHARES, in_words

View = dict[str, Any]


def stages_of(results: Results) -> View | None:
    """Return time, memory and disk by step of the run; all steps of one method and kind are one row."""
    groups: dict[str, dict[str, float]] = {}
    for about in map(mapping, results.items("stages")):
        seconds = number(about.get("seconds"))
        if "name" not in about or seconds is None:
            continue
        group = groups.setdefault(
            _stage_name(about),
            {"seconds": 0.0, "runs": 0, "reused": 0, "peak_memory": 0.0, "bytes": 0.0},
        )
        group["seconds"] += seconds
        group["bytes"] += number(about.get("bytes")) or 0.0
        group["peak_memory"] = max(group["peak_memory"], number(about.get("peak_memory")) or 0.0)
        group["runs"] += 1
        group["reused"] += bool(about.get("reused"))
    if not groups:
        return None
    longest = max((g["seconds"] for g in groups.values() if math.isfinite(g["seconds"])), default=0.0)
    rows = []
    for name, g in groups.items():
        runs, reused = int(g["runs"]), int(g["reused"])
        share = g["seconds"] / longest if longest > 0 and math.isfinite(g["seconds"]) else 0.0
        rows.append(
            {
                "name": name,
                "runs": runs,
                "time": duration(g["seconds"]),
                "memory": size(g["peak_memory"]) if g["peak_memory"] else "",
                "disk": size(g["bytes"]) if g["bytes"] else "",
                "width": f"{100 * max(0.0, share):.1f}",
                "reused": "" if not reused else "reused" if reused == runs else f"{reused} of {runs} reused",
                "all_reused": reused == runs,
            }
        )
    return {
        "rows": rows,
        "total": duration(math.fsum(g["seconds"] for g in groups.values())),
        "disk": size(math.fsum(g["bytes"] for g in groups.values())),
        "any_reused": any(g["reused"] for g in groups.values()),
        "any_memory": any(g["peak_memory"] for g in groups.values()),
        "any_disk": any(g["bytes"] for g in groups.values()),
    }


def read_of(results: Results) -> View | None:
    """Return what was read: the data sets, the chat template, and how many rows of them each stage kept."""
    counts = ("rows", "kept", "truncated_prompts", "truncated_responses")
    stages: dict[tuple[str, ...], list[str]] = {}
    entries = [mapping(about) for about in results.items("stages")]
    several = len({repr(about.get("seed")) for about in entries}) > 1
    for about in entries:
        if one := mapping(about.get("read")):
            of_seed = f", seed {clean(about.get('seed'))}" if several else ""
            reasons = mapping(one.get("dropped")).items()
            dropped = "; ".join(f"{_count(rows)}: {clean(reason)}" for reason, rows in reasons) or "none"
            numbers = [_count(one.get(key)) for key in counts]
            key = (clean(one.get("data", "")) + of_seed, *numbers, dropped, clean(one.get("ids", "")))
            stages.setdefault(key, []).append(_stage_name(about))
    read = results.mapping("read")
    sets, teachers = read.get("data"), mapping(read.get("teacher_tokenizer"))
    templates = [mapping(one.get("template")) for one in (read, teachers)]
    data = [
        {
            "name": clean(one.get("name", "")),
            "source": clean(one.get("source", "")),
            "rows": _count(one.get("rows")),
            "unread": ", ".join(map(clean, one["unread"])) if isinstance(one.get("unread"), list) else "",
        }
        for one in map(mapping, sets if isinstance(sets, list) else [])
    ]
    if not (stages or data):
        return None
    names = ("data", *counts, "dropped", "ids")
    limits = {name: _count(read.get(name)) for name in ("max_length", "max_prompt_length")}
    return {
        "data": data,
        "stages": [{**dict(zip(names, key, strict=True)), "names": _joined(of)} for key, of in stages.items()],
        **_across(entries),
        "limits": ", ".join(f"{name} {limit}" for name, limit in limits.items() if limit),
        "teacher": {
            "tokenizer": clean(teachers.get("tokenizer", "")),
            "tokens": _count(teachers.get("tokens")),
            "other": teachers.get("same_tokens") is False,
            "form": form_text(mapping(teachers.get("form"))),
        }
        if teachers
        else None,
        "templates": [
            {
                "tokenizer": clean(template.get("tokenizer", "")),
                "digest": clean(template.get("sha256", ""))[:12],
                "start": cut(str(template.get("start", "")), 400),
            }
            for template in templates
            if template
        ],
    }


def _across(entries: list[dict[str, Any]]) -> View:
    """Return what trainings share with a teacher of other tokens, and what its distributions lose, each with names."""
    shared: dict[str, list[str]] = {}
    losses: dict[str, list[str]] = {}
    for about in entries:
        stored = mapping(mapping(about.get("read")).get("across"))
        numbers = {name: number(stored.get(name)) for name in ("shared", *SHARES)}
        shares = {name: share for name, share in numbers.items() if share is not None and math.isfinite(share)}
        if "shared" in shares:
            shared.setdefault(f"{100 * shares['shared']:.1f} %", []).append(_stage_name(about))
        if shares.keys() >= {*SHARES}:
            losses.setdefault(in_words(shares), []).append(_stage_name(about))
    return {
        "shared": "; ".join(
            f"{share} of the student's states, for {_joined(names)}" for share, names in shared.items()
        ),
        "across": [f"{_joined(names)}: {words}" for words, names in losses.items()],
    }


def _joined(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _count(value: Any) -> str:
    count = number(value)
    return f"{count:,.0f}" if count is not None and math.isfinite(count) else ""


def _stage_name(about: dict[str, Any]) -> str:
    """Return the name of a stage, one for all data orders of a method."""
    kind, method = about.get("kind"), about.get("method")
    return clean(f"{kind} {method}" if kind and method else about.get("name", ""))
