"""A judge's replies: one row per request in verdicts.jsonl, so that a rerun asks only what is missing or failed."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefdistill.core.file_artifact import RecordArtifact
from prefdistill.core.parts import RowLog
from prefdistill.core.progress import Progress, say
from prefdistill.evaluation.judges.client import Endpoint, Question, Reply, ask_all
from prefdistill.evaluation.judges.inputs import provenance
from prefdistill.evaluation.judges.options import Judging
from prefdistill.evaluation.judges.verdicts import CONTRADICTORY, OUTCOMES, PARSED, Verdict

FAILED_SHARE = 0.02  # share of requests or verdicts above which a failure is a warning


def judge(
    task: str,
    out: Path,
    endpoint: Endpoint,
    options: Judging,
    request: dict[str, Any],
    answers: Mapping[str, Path],
    work: Callable[["Ledger", dict[str, Any]], tuple[dict[str, Any], list[dict[str, Any]]]],
) -> dict[str, Any]:
    """Run a judging task and write `OUT/results.json`, which is derived from the verdicts and replaced by each call.

    Args:
        task: "mt-bench" or "alpaca-eval".
        out: the directory.
        endpoint: the judge.
        options: with the prices.
        request: what the result depends on besides judge, answers and prices.
        answers: files of answers by the name of their side.
        work: asks through the ledger; from it and the provenance of the answers, by side, which it may add to, to a
            part of the results, perhaps with "warnings", and the rows that they rest on.

    Raises:
        UserError: if `out` holds other work, or the endpoint refuses.
        RuntimeError: if no request is answered.
    """
    begun = time.monotonic()
    sources = {who: provenance(path) for who, path in answers.items()}
    request |= {"task": task, "judge": {"model": endpoint.model, "fields": endpoint.body}}
    request |= {who: source["sha256"] for who, source in sources.items()}
    request |= {"price_in": options.price_in, "price_out": options.price_out}
    artifact = RecordArtifact(f"judge {task}", out / "results.json", request, f"judge {task}", mark="task")
    with artifact.session(reuse=False):
        ledger = Ledger(out / "verdicts.jsonl")
        part, rows = work(ledger, sources)
        results = {"task": task, **part, **_summary(rows, endpoint, options), "answers": sources}
        results["warnings"] += part.get("warnings", [])
        results["seconds"] = round(time.monotonic() - begun, 3)
        results["asked_now"] = ledger.asked
        for warning in results["warnings"]:
            say(f"warning: {warning}")
        return artifact.seal(results)


class Ledger(RowLog):
    """The verdicts of an output directory.

    Example:
        >>> ledger = Ledger(Path("judged/verdicts.jsonl"))                                  # doctest: +SKIP
        >>> ledger.ask(endpoint, questions, verdict, what="grading")                        # doctest: +SKIP
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.asked = 0

    def ask(
        self, endpoint: Endpoint, questions: Sequence[Question], verdict: Callable[[Reply], Verdict], *, what: str
    ) -> list[dict[str, Any]]:
        """Return a row per question, in their order; ask only those that have no reply yet.

        Args:
            endpoint: the judge.
            questions: those with the same text are asked once.
            verdict: parses a reply.
            what: name on the progress bar.

        Raises:
            UserError: if the endpoint refuses the key, the address or the model.
            RuntimeError: if no request at all is answered.
        """
        keys = [question.key(endpoint) for question in questions]
        missing = {k: q for k, q in zip(keys, questions, strict=True) if self.rows.get(k, {}).get("reply") is None}
        done = len(set(keys)) - len(missing)
        reused = [self.rows[key] for key in dict.fromkeys(keys) if key not in missing]
        if elsewhere := [row["url"] for row in reused if row.get("url") != endpoint.url]:
            say(
                f"{what}: {len(elsewhere):,} verdicts are reused that {elsewhere[0]} gave, not {endpoint.url}; for new "
                "ones give another --out"
            )
        if missing:
            variable, _ = endpoint.key()
            key_source = f"the key of {variable}" if variable else "no key"
            resumed = f", {done:,} reused" if done else ""
            say(f"{what}: {len(missing):,} questions to {endpoint.model} at {endpoint.url} with {key_source}{resumed}")
        with self.appending() as append, Progress(what, len(set(keys)), "verdict", done) as progress:

            def record(question: Question, reply: Reply) -> None:
                append(
                    {
                        "key": question.key(endpoint),
                        **question.about,
                        **_parsed(reply, verdict),
                        **asdict(reply),
                        "judge": endpoint.model,
                        "url": endpoint.url,
                        "time": round(time.time(), 3),
                    }
                )
                self.asked += 1
                progress.update()

            if missing:
                ask_all(endpoint, missing.values(), record)
        return [self._row(key, question, verdict) for key, question in zip(keys, questions, strict=True)]

    def _row(self, key: str, question: Question, verdict: Callable[[Reply], Verdict]) -> dict[str, Any]:
        """Return the row of a question with the question's own labels and its reply parsed again: it may have been
        written for another question of the same text, or parsed by another rule.
        """
        row = self.rows[key]
        reply = Reply(**{name: row[name] for name in Reply.__dataclass_fields__ if name in row})
        return row | question.about | _parsed(reply, verdict)


def _parsed(reply: Reply, verdict: Callable[[Reply], Verdict]) -> dict[str, Any]:
    """Return the columns of a reply's verdict; without a reply its outcome is "error"."""
    if reply.error is not None:
        return {"verdict": None, "outcome": "error", "reasoning_cut": False}
    parsed = verdict(reply)
    return {"verdict": parsed.value, "outcome": parsed.outcome, "reasoning_cut": parsed.reasoning_cut}


def outcome_counts(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Count verdicts by outcome. "reasoning_cut" counts replies with reasoning, whatever their outcome.

    Args:
        rows: with "outcome" and "reasoning_cut".
    """
    by_outcome = Counter(row["outcome"] for row in rows)
    return {
        "verdicts": len(rows),
        "unparsable": sum(by_outcome[outcome] for outcome in OUTCOMES if outcome != PARSED),
        "errors": by_outcome["error"],
        "outcomes": {outcome: by_outcome[outcome] for outcome in OUTCOMES}
        | {"reasoning_cut": sum(row["reasoning_cut"] for row in rows)},
    }


def _summary(rows: Sequence[dict[str, Any]], endpoint: Endpoint, options: Judging) -> dict[str, Any]:
    """Return the judge as its server names it, the failures, tokens and cost of rows of `Ledger.ask`.

    Rows of the same text count once; the cost is None without both prices.
    """
    unique = list({row["key"]: row for row in rows}.values())
    answered = [row for row in unique if row["error"] is None]
    tokens = {side: sum(row[f"tokens_{side}"] or 0 for row in answered) for side in ("in", "out")}
    uncounted = sum(row["tokens_in"] is None or row["tokens_out"] is None for row in answered)
    cost = None
    if options.price_in is not None and options.price_out is not None:
        cost = round((tokens["in"] * options.price_in + tokens["out"] * options.price_out) / 1e6, 6)
    unparsable = [row for row in answered if row["verdict"] is None]
    cut = sum(row["finish"] == "length" for row in unparsable)
    counts = outcome_counts(unique)
    errors = counts["errors"]
    if errors and not answered:
        raise RuntimeError(f"all {errors} requests failed, the last one: {unique[-1]['error']}")
    warnings = []
    if errors > FAILED_SHARE * len(unique):
        ((frequent, _),) = Counter(row["error"] for row in unique if row["error"] is not None).most_common(1)
        warnings.append(f"{errors} of {len(unique)} requests failed ({frequent}); the same command retries them")
    if len(unparsable) > FAILED_SHARE * len(unique):
        contradictory = counts["outcomes"][CONTRADICTORY]
        reasons = [f"{contradictory} of them state two that differ"] if contradictory else []
        reasons += [f"{cut} of them truncated at the token limit"] if cut else []
        none = "hold no single verdict" if contradictory else "hold no verdict"
        warnings.append(f"{len(unparsable)} of {len(unique)} replies {', '.join([none, *reasons])}; they are left out")
    if uncounted:
        warnings.append(f"{uncounted} replies came without token counts: tokens and cost are too low")
    return {
        "judge": {
            "model": endpoint.model,
            "urls": sorted({row["url"] for row in unique}),
            "served_as": sorted({row["served_as"] for row in answered if row["served_as"]}),
            "fingerprints": sorted({row["fingerprint"] for row in answered if row["fingerprint"]}),
            "fields": endpoint.body,
        },
        "requests": {
            **counts,
            "unparsable_at_token_limit": cut,
            "retries": sum(row["retries"] for row in unique),
            "seconds": round(sum(row["seconds"] for row in unique), 3),
        },
        "tokens": tokens,
        "cost": cost,
        "warnings": warnings,
    }
