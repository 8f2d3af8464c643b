"""What has been asked and answered: one row per request in verdicts.jsonl, which a rerun reads before it asks."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefdistill.core.errors import UserError
from prefdistill.core.progress import Progress, say
from prefdistill.evaluation.judges.client import Endpoint, Question, Reply, ask_all, judge_key

FAILED_SHARE = 0.02  # of the requests or verdicts from which on a result is to be read with that in mind


class Ledger:
    """The rows of a file, the last one of each key. A torn last line, of an interrupted run, is cut off.

    Example:
        >>> ledger = Ledger(Path("judged/verdicts.jsonl"))                                  # doctest: +SKIP
        >>> ledger.ask(endpoint, questions, what="grading")                                 # doctest: +SKIP
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        self.asked = 0
        if path.exists():
            self._read()

    def _read(self) -> None:
        whole, place = self.path.read_bytes(), 0
        for number, line in enumerate(whole.splitlines(keepends=True), start=1):
            try:
                row = json.loads(line)
                if not line.endswith(b"\n") or not isinstance(row["key"], str):
                    raise ValueError
            except (ValueError, TypeError, KeyError):
                if place + len(line) < len(whole):
                    raise UserError(
                        f"{self.path}, line {number}: no row of a verdict; repair it, or give another --out"
                    ) from None
                with self.path.open("rb+") as file:
                    file.truncate(place)
                return
            self.rows[row["key"]] = row
            place += len(line)

    def ask(
        self, endpoint: Endpoint, questions: Sequence[Question], verdict: Callable[[Reply], Any], *, what: str
    ) -> list[dict[str, Any]]:
        """A row per question, in their order, of which only those are asked that have no reply yet.

        Args:
            endpoint: the judge.
            questions: with the same words are asked once.
            verdict: reads a reply; None is unparsable.
            what: name on the progress bar.

        Raises:
            UserError: if the endpoint refuses the key, the address or the model.
            RuntimeError: if no request at all was answered.
        """
        keys = [question.key(endpoint) for question in questions]
        missing = {k: q for k, q in zip(keys, questions, strict=True) if self.rows.get(k, {}).get("reply") is None}
        done = len(set(keys)) - len(missing)
        kept = [self.rows[key] for key in dict.fromkeys(keys) if key not in missing]
        if elsewhere := [row["url"] for row in kept if row.get("url") != endpoint.url]:
            say(
                f"{what}: {len(elsewhere):,} verdicts are kept that {elsewhere[0]} gave, not {endpoint.url}; for new "
                "ones give another --out"
            )
        if missing:
            variable, _ = judge_key()
            known = f", {done:,} are known" if done else ""
            said = f"the key of {variable}" if variable else "no key"
            say(f"{what}: {len(missing):,} questions to {endpoint.model} at {endpoint.url} with {said}{known}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file, Progress(what, len(set(keys)), "verdict", done) as progress:

            def keep(question: Question, reply: Reply) -> None:
                row = {
                    "key": question.key(endpoint),
                    **question.about,
                    "verdict": None if reply.error else verdict(reply),
                    **asdict(reply),
                    "judge": endpoint.model,
                    "url": endpoint.url,
                    "time": round(time.time(), 3),
                }
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())  # a verdict may have cost money
                self.rows[row["key"]] = row
                self.asked += 1
                progress.update()

            if missing:
                ask_all(endpoint, missing.values(), keep)
        return [self._row(key, question, verdict) for key, question in zip(keys, questions, strict=True)]

    def _row(self, key: str, question: Question, verdict: Callable[[Reply], Any]) -> dict[str, Any]:
        """What is known of a question, under its own name and read anew: the row may have been written for another
        question of the same words, or under another rule.
        """
        row = self.rows[key]
        reply = Reply(**{name: row[name] for name in Reply.__dataclass_fields__ if name in row})
        return row | question.about | {"verdict": None if reply.error is not None else verdict(reply)}


def summary(
    rows: Sequence[dict[str, Any]], endpoint: Endpoint, price_in: float | None, price_out: float | None
) -> dict[str, Any]:
    """Of the rows that a result rests on: the judge as its server names it, what failed, tokens and money.

    Args:
        rows: of `Ledger.ask`; those with the same words count once.
        endpoint: the judge.
        price_in, price_out: money per million tokens; the cost is None without both.
    """
    own = list({row["key"]: row for row in rows}.values())
    answered = [row for row in own if row["error"] is None]
    tokens = {side: sum(row[f"tokens_{side}"] or 0 for row in answered) for side in ("in", "out")}
    unknown = sum(row["tokens_in"] is None or row["tokens_out"] is None for row in answered)
    cost = None
    if price_in is not None and price_out is not None:
        cost = round((tokens["in"] * price_in + tokens["out"] * price_out) / 1e6, 6)
    unparsable = [row for row in answered if row["verdict"] is None]
    cut = sum(row["finish"] == "length" for row in unparsable)
    errors = len(own) - len(answered)
    if errors and not answered:
        raise RuntimeError(f"all {errors} requests failed, the last one: {own[-1]['error']}")
    warnings = []
    if errors > FAILED_SHARE * len(own):
        warnings.append(f"{errors} of {len(own)} requests failed ({own_error(own)}); the same command asks them again")
    if len(unparsable) > FAILED_SHARE * len(own):
        reason = f", {cut} of them cut off at the limit of tokens" if cut else ""
        warnings.append(f"{len(unparsable)} of {len(own)} replies hold no verdict{reason}; they are left out")
    if unknown:
        warnings.append(f"{unknown} replies came without a count of tokens: tokens and cost are too low")
    return {
        "judge": {
            "model": endpoint.model,
            "urls": sorted({row["url"] for row in own}),
            "served_as": sorted({row["served_as"] for row in answered if row["served_as"]}),
            "fingerprints": sorted({row["fingerprint"] for row in answered if row["fingerprint"]}),
            "fields": endpoint.body,
        },
        "requests": {
            "verdicts": len(own),
            "unparsable": len(unparsable),
            "unparsable_at_token_limit": cut,
            "errors": errors,
            "retries": sum(row["retries"] for row in own),
            "seconds": round(sum(row["seconds"] for row in own), 3),
        },
        "tokens": tokens,
        "cost": cost,
        "warnings": warnings,
    }


def own_error(rows: Sequence[dict[str, Any]]) -> str:
    """The most frequent error."""
    errors = [row["error"] for row in rows if row["error"] is not None]
    return max(set(errors), key=errors.count)
