"""The verbs by name, imported when they are needed.

A verb is a function of one section, whose fields are its flags, that returns the JSON object to print; its docstring
is the help, with an example. To add one: the function in a module here and its line in `VERBS`; from another package,
an entry point of the group `prefdistill.verbs`. A name of two words, such as "judge answers", is a verb of a group.
A verb runs in one process, unless it is one of `ON_SEVERAL`.
"""

from prefdistill.core.registry import Registry

_HERE = "prefdistill.cli.verbs"
VERBS = Registry(
    "verb",
    "verbs",
    {
        "quickstart": f"{_HERE}.run:quickstart",
        "doctor": f"{_HERE}.doctor:doctor",
        "plan": f"{_HERE}.run:plan",
        "run": f"{_HERE}.run:run",
        "sft": f"{_HERE}.train:sft",
        "dpo": f"{_HERE}.train:dpo",
        "sample": f"{_HERE}.sample:sample",
        "signals": f"{_HERE}.signals:signals",
        "distill": f"{_HERE}.train:distill",
        "evaluate": f"{_HERE}.evaluate:evaluate",
        "inspect": f"{_HERE}.show:inspect",
        "report": f"{_HERE}.show:report",
        "judge answers": f"{_HERE}.judge:answers",
        "judge mt-bench": f"{_HERE}.judge:mt_bench",
        "judge alpaca-eval": f"{_HERE}.judge:alpaca_eval",
        "study": f"{_HERE}.run:study",
    },
)

ON_SEVERAL = {"sft", "dpo", "distill", "signals"}  # under `accelerate launch` or torchrun; others would all write

GROUPS = {
    "judge": "Responses compared by a language model behind an OpenAI-compatible endpoint. The key is read from the "
    "environment (PREFDISTILL_JUDGE_KEY, else OPENAI_API_KEY) and stored nowhere."
}
