"""The section "How to read this": the terms of the page in plain words."""

from prefdistill.report.load import Run

GLOSSARY = {
    "±": "the standard error of the mean over the repeats, and over the test prompts where the repeats share them: how "
    "far the mean would move if all of it were repeated. It is not the spread of single runs.",
    "Difference": "paired: within each repeat a method and the baseline share the student's start, the pairs and the "
    "test prompts, so what varies between starts cancels. Compare differences, not levels.",
    "Ahead, behind": "the difference is larger than two standard errors and than the noise floor, and its 95 % "
    "interval (Student's t, wide where repeats are few) excludes zero. “Leans”: the interval still includes zero. "
    "“Within noise”: anything smaller. Nothing is corrected for comparing many methods.",
    "Data orders": "the trainings differ only in the order of the training data. They say nothing about another seed, "
    "that is another teacher, other pairs and another start.",
    "Noise floor": "a repeat of a method, usually the baseline with another data order. Its difference should be zero; "
    "a method has to differ by more than this to have had an effect.",
    "Placebo": "the same method with an uninformative teacher signal, such as that of another row. If it does as "
    "well, the signal is not the reason.",
    "Bound": "the method with the best signal that is known, such as the true reward in place of the teacher's: a "
    "yardstick, not a method; a method may exceed it.",
    "T=1": "responses are sampled at temperature 1: what the model does on average. Greedy decoding takes the most "
    "likely token instead and hides how often it errs.",
    "Margin accuracy": "the fraction of held-out pairs in which a term is larger for the better response, a tie "
    "counting one half. One half is chance; compare the shaping term with the simple ones beside it, such as length.",
    "Loss": "methods have different losses; compare shapes, not heights.",
}


def glossary_of(runs: list[Run]) -> list[tuple[str, str]]:
    """Return the terms that occur on the page, and their explanations."""
    results = [run["results"] for run in runs]
    kinds = {role.kind for one in results for role in one.roles.values()}
    over = {one.repeats(d) for one in results for name in one.methods if (d := one.difference(name))}
    occurs = {
        "Difference": over,
        "Ahead, behind": over,
        "Data orders": "data orders" in over,
        "Noise floor": "noise_floor" in kinds,
        "Placebo": "placebo" in kinds,
        "Bound": "bound" in kinds,
        "T=1": any("T=1" in column.label for one in results for column in one.columns),
        "Margin accuracy": any(one.mapping("margin_accuracy") for one in results),
        "Loss": any(run["curves"] for run in runs),
    }
    return [(term, text) for term, text in GLOSSARY.items() if occurs.get(term, True)]
