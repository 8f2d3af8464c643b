"""A recipe from start to end: plan, run, results, studies, and the checks before a run."""
