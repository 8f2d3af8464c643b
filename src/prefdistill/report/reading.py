"""The section "How to read this": the terms of the page in plain words."""

from prefdistill.evaluation.results import columns_of, difference, headline_column, repeats, roles_in
from prefdistill.report.run import Run


def reading_of(runs: list[Run]) -> list[tuple[str, str]]:
    """Return terms and their explanations, of those that occur on the page."""
    kinds = {role.kind for run in runs for role in roles_in(run["results"]).values()}
    labels = " ".join(column.label for run in runs for column in columns_of(run["results"]))
    over = {
        repeats(run["results"], d)
        for run in runs
        for name in run["results"]["methods"]
        if (d := difference(run["results"], name, headline_column(run["results"])))
    }
    words = [
        (
            "±",
            "the standard error of the mean over the repeats: how far the mean would move if all of it were repeated. "
            "It is not the spread of single runs.",
        )
    ]
    if over:
        words.append(
            (
                "Difference",
                "paired: within each repeat a method and the baseline share the student's start, the pairs and the "
                "test prompts, so what varies between starts cancels. Compare differences, not levels.",
            )
        )
        words.append(
            (
                "Ahead, behind",
                "the difference is larger than two standard errors and than the noise floor, and its 95 % interval "
                "(Student's t, wide where repeats are few) excludes zero. “Leans”: the interval still includes zero. "
                "“Within noise”: anything smaller. Nothing is corrected for comparing many methods.",
            )
        )
    if "data orders" in over:
        words.append(
            (
                "Data orders",
                "the repeats differ only in the order of the training data. They say nothing about another seed, "
                "that is another teacher, other pairs and another start.",
            )
        )
    if "noise_floor" in kinds:
        words.append(
            (
                "Noise floor",
                "a repeat of a method, usually the baseline with another data order. Its difference should be zero; a "
                "method has to differ by more than this to have had an effect.",
            )
        )
    if "placebo" in kinds:
        words.append(
            (
                "Placebo",
                "the same method with an uninformative teacher signal, such as that of another row. If it does as "
                "well, the signal is not the reason.",
            )
        )
    if "bound" in kinds:
        words.append(
            (
                "Bound",
                "the method with the best signal that is known, such as the true reward in place of the teacher's: a "
                "yardstick, not a method; a method may exceed it.",
            )
        )
    if "T=1" in labels:
        words.append(
            (
                "T=1",
                "responses are sampled at temperature 1: what the model does on average. Greedy decoding takes the "
                "most likely token instead and hides how often it errs.",
            )
        )
    if any(run["results"].get("margin_accuracy") for run in runs):
        words.append(
            (
                "Margin accuracy",
                "the fraction of held-out pairs in which a term is larger for the better response, a tie counting one "
                "half. One half is chance; compare the shaping term with the simple ones beside it, such as length.",
            )
        )
    if any(run["curves"] for run in runs):
        words.append(("Loss", "methods have different losses; compare shapes, not heights."))
    return words
