"""Write a directory of data, models, stores and settings with one fault each, beside valid ones."""

import gzip
import json
import math
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from prefdistill.core.files import read_sealed, write_sealed
from support.pairs import write_jsonl

# A token whose embedding in the model "nan" is nan; one row of poisoned.jsonl has it.
POISON = "Q"
POISONED_ROW = 3


def messages(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def write_data(directory: Path, pairs: Any) -> None:
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in pairs]
    few, first = rows[:6], rows[0]
    plain = [{key: "".join(message["content"] for message in row[key]) for key in row} for row in few]
    write_jsonl(directory / "pairs.jsonl", few)
    write_jsonl(directory / "others.jsonl", rows[6:12])
    write_jsonl(directory / "plain.jsonl", plain)
    poisoned = [dict(row) for row in few]
    poisoned[POISONED_ROW]["rejected"] = messages("assistant", f"the small {POISON} teacher")
    write_jsonl(directory / "poisoned.jsonl", poisoned)
    asked = [messages("user", f"the {POISON}") if number == 2 else row["prompt"] for number, row in enumerate(few)]
    write_jsonl(directory / "questions-poisoned.jsonl", [{"prompt": prompt} for prompt in asked])
    write_jsonl(
        directory / "infinite-rows.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in few]
    )
    write_jsonl(directory / "mixed.jsonl", [few[0], few[1], plain[2]])
    write_jsonl(directory / "nulls.jsonl", [row | {"chosen": None} for row in few])
    write_jsonl(directory / "one-null.jsonl", [*few[:4], few[4] | {"rejected": None}])
    write_jsonl(directory / "numbers.jsonl", [{"prompt": "a", "chosen": 1, "rejected": 2}])
    write_jsonl(directory / "no-messages.jsonl", [first, first | {"chosen": []}])
    write_jsonl(directory / "no-content.jsonl", [first | {"chosen": [{"role": "assistant"}]}])
    write_jsonl(directory / "roles.jsonl", [first, first | {"rejected": messages("user", "no")}])
    write_jsonl(directory / "steering.jsonl", [first | {"rejected": messages("user\x1b]0;owned\x07", "no")}])
    write_jsonl(directory / "answered.jsonl", [first | {"prompt": messages("user", "a") + messages("assistant", "b")}])
    write_jsonl(directory / "scores.jsonl", [row | {"score_chosen": "good", "score_rejected": "bad"} for row in few])
    scored = [row | {"score_chosen": 1.0, "score_rejected": 0.0} for row in few]
    write_jsonl(directory / "scored.jsonl", scored)
    write_jsonl(directory / "unscored.jsonl", [*scored[:3], few[3], *scored[4:]])
    write_jsonl(directory / "ended.jsonl", [row | {"chosen_ended": "yes"} for row in few])
    write_jsonl(directory / "scores-mixed.jsonl", [few[0] | {"score_chosen": 1.0}, few[1] | {"score_chosen": "good"}])
    write_jsonl(directory / "ended-mixed.jsonl", [few[0] | {"chosen_ended": True}, few[1] | {"chosen_ended": "yes"}])
    write_jsonl(directory / "surrogate.jsonl", [plain[0], plain[1] | {"chosen": "half a \ud800 character"}])
    write_jsonl(directory / "long.jsonl", [row | {"prompt": messages("user", "a small prompt " * 900)} for row in few])
    columns = {"prompt": pa.array(["a"]), "chosen": pa.array(["b"]), "rejected": pa.array(["c"])}
    pq.write_table(pa.table(columns).slice(0, 0), directory / "rowless.parquet")
    pq.write_table(pa.table([*columns.values(), columns["chosen"]], [*columns, "chosen"]), directory / "twice.parquet")
    write_jsonl(directory / "apart.jsonl", [{"chosen": messages("user", "a"), "rejected": messages("user", "b")}])
    write_jsonl(directory / "columns.jsonl", [{"question": "a", "answer": "b"}])
    write_jsonl(directory / "messages.jsonl", [{"messages": messages("user", "a")}])
    write_jsonl(directory / "messages-text.jsonl", [{"messages": "a"}])
    write_jsonl(directory / "responses.jsonl", [{"prompt": row["prompt"], "response": "the small"} for row in few])
    write_jsonl(directory / "wordless.jsonl", [row | {"response": None} for row in few])
    write_jsonl(directory / "list.jsonl", [[1, 2]])
    (directory / "broken.jsonl").write_text(f"{json.dumps(first)}\n\n{json.dumps(first)[:-9]}\n")
    (directory / "deep.jsonl").write_text('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    (directory / "digits.jsonl").write_text('{"prompt": ' + "9" * 5_000 + "}\n")
    (directory / "latin.jsonl").write_bytes('{"prompt": "café"}\n'.encode("latin-1"))
    (directory / "empty.jsonl").write_text("")
    (directory / "blank.jsonl").write_text("\n\n")
    (directory / "data.tsv").write_text("prompt,chosen,rejected\na,b,c\n")
    (directory / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    (directory / "text.jsonl.gz").write_text(json.dumps(first))
    (directory / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(first).encode() * 50)[:-9])
    if os.path.exists("/proc/self/mem"):
        (directory / "unreadable.jsonl").symlink_to("/proc/self/mem")  # its first byte cannot be read, not even by root
    (directory / "empty").mkdir()
    (directory / "full").mkdir()
    (directory / "full" / "thesis.tex").write_text("all of it")


def write_models(directory: Path, make_model: Any, tokenizer: Any) -> None:
    """Write valid models, and models with one fault each; their tokenizers are valid unless the name says otherwise."""
    from transformers import AutoModel, AutoModelForSequenceClassification

    from prefdistill.models.scratch import train_tokenizer

    def save(name: str, model: Any, own: Any = tokenizer) -> Path:
        model.save_pretrained(directory / name)
        own.save_pretrained(directory / name)
        return directory / name

    model = make_model(num_hidden_layers=1)
    save("model", model)
    few = make_model(num_hidden_layers=1)
    few.resize_token_embeddings(len(tokenizer) // 2)
    save("few-rows", few)
    save("headless", AutoModel.from_config(model.config))
    save("classifier", AutoModelForSequenceClassification.from_config(model.config))
    save("other", make_model(1, num_hidden_layers=1), train_tokenizer(["some other words altogether"] * 9, 320))
    for name in ("no-template", "bad-template", "no-end", "no-config", "no-weights", "cut-weights", "odd-type"):
        shutil.copytree(directory / "model", directory / name)
    (directory / "no-template" / "chat_template.jinja").unlink()
    (directory / "bad-template" / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }")
    settings = json.loads((directory / "no-end" / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (directory / "no-end" / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "no-config" / "config.json").write_text("{broken")
    (directory / "no-weights" / "model.safetensors").unlink()
    weights = (directory / "cut-weights" / "model.safetensors").read_bytes()
    (directory / "cut-weights" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    config = json.loads((directory / "odd-type" / "config.json").read_text())
    (directory / "odd-type" / "config.json").write_text(json.dumps(config | {"model_type": "gpt-17"}))
    write_damaged_models(directory)
    nan = make_model(num_hidden_layers=1)
    with torch.no_grad():
        (poison,) = tokenizer(POISON, add_special_tokens=False)["input_ids"]
        nan.get_input_embeddings().weight[poison] = float("nan")
    save("nan", nan)
    infinite = make_model(num_hidden_layers=1)
    with torch.no_grad():
        infinite.get_output_embeddings().weight[:] = float("inf")
    save("infinite", infinite)


class Code:
    """An object whose unpickling runs code."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def write_damaged_models(directory: Path) -> None:
    """Write files of a structure that transformers and PEFT do not expect, on which they may raise anything."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(directory / "model", directory / name))

    def changed(name: str, file: str, value: Any) -> None:
        (copy(name) / file).write_text(json.dumps(value))

    config = json.loads((directory / "model" / "config.json").read_text())
    changed("other-config", "config.json", config | {"hidden_size": "large"})
    changed("config-list", "config.json", [])
    changed("generation-list", "generation_config.json", [])
    changed("tokenizer-list", "tokenizer_config.json", [])
    changed("tokenizer-empty", "tokenizer.json", {})
    changed("adapter-list", "adapter_config.json", [])
    changed("adapter-type", "adapter_config.json", {"base_model_name_or_path": "model", "peft_type": "EVIL"})
    (copy("dividing-template") / "chat_template.jinja").write_text("{{ messages[0].content }}{{ 1 / 0 }}")
    weights = load_file(directory / "model" / "model.safetensors")
    other = {name: torch.ones(3, 3) if name.endswith("q_proj.weight") else value for name, value in weights.items()}
    save_file(other, copy("other-shape") / "model.safetensors", metadata={"format": "pt"})
    away = copy("index-away")
    (away / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "../../../../etc/hostname")}
    (away / "model.safetensors.index.json").write_text(json.dumps(index))
    pickled = copy("pickled")
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Code()}, protocol=2))


def write_stores(directory: Path) -> None:
    from prefdistill.data.truncation import Truncation
    from prefdistill.signals import extract_signals

    def store(name: str, model: str = "model", data: str = "pairs.jsonl", **options: Any) -> None:
        extract_signals(str(directory / model), str(directory / data), out=directory / name, dtype="float32", **options)

    store("teacher", kinds=("values", "logps"))
    store("endpoints", kinds=("values",), positions="endpoints")
    store("warm", kinds=("values",), value_temperature=2.0)
    store("topk", kinds=("topk",), k=4)
    store("topk-poisoned", data="poisoned.jsonl", kinds=("topk",), k=4)
    store("reference", kinds=("logps",), role="reference")
    store("reference-poisoned", data="poisoned.jsonl", kinds=("logps",), role="reference")
    store("reference-short", kinds=("logps",), role="reference", truncation=Truncation(24))
    store("reference-others", data="others.jsonl", kinds=("logps",), role="reference")
    store("reference-tokens", model="other", kinds=("logps",), role="reference")
    for name in ("damaged", "gone", "no-schema", "no-json", "unfinished"):
        shutil.copytree(directory / "reference", directory / name)
    shard = directory / "damaged" / "shards" / "00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    (directory / "gone" / "shards" / "00000.parquet").unlink()
    manifest = read_sealed(directory / "no-schema" / "manifest.json")
    write_sealed(directory / "no-schema" / "manifest.json", manifest | {"schema": 1})
    (directory / "no-json" / "manifest.json").write_text("{")
    (directory / "unfinished" / "manifest.json").unlink()


RECIPE = """
name: x
data: {train: pairs.jsonl, test: others.jsonl}
model: {teacher: model, student: model}
training: {batch_size: 2, micro_batch_size: 2, max_steps: 1}
methods: {dpo: {}}
"""


def write_settings(directory: Path) -> None:
    """Write recipes and studies."""
    recipes = {
        "recipe": RECIPE,
        "itself": "extends: itself.yaml\n" + RECIPE,
        "round": "extends: trip.yaml\n" + RECIPE,
        "trip": "extends: round.yaml\n",
        "above": "extends: nowhere.yaml\n",
        "number": "extends: 3\n",
        "tab": "name: x\n\tdata: y\n",
        "list": "- a\n- b\n",
        "nothing": "",
        "tagged": "name: !!python/object/apply:os.system ['touch ran']\n",
        "trusting": RECIPE.replace("student: model", "student: model, trust_remote_code: true"),
        "twice": RECIPE.replace("{dpo: {}}", "{tvkd: {start: dpo}, dpo: {start: tvkd}}"),
        "word": RECIPE.replace("max_steps: 1", "max_steps: many"),
        "endless": RECIPE + "task: &t [*t]\n",
        "octal": RECIPE.replace("max_steps: 1", "max_steps: 010"),
        "endless-options": RECIPE.replace("max_steps: 1", "max_steps: 1, arguments: &a {b: *a}"),
        "key-twice": RECIPE.replace("{dpo: {}}", "{dpo: {beta: 0.1}, dpo: {beta: 5.0}}"),
        "half": RECIPE + 'task: "a \\ud800"\n',
        "slash": RECIPE.replace("name: x", "name: ../x"),
        "no-methods": RECIPE.replace("{dpo: {}}", "{}"),
    }
    for name, text in recipes.items():
        (directory / f"{name}.yaml").write_text(text)
    study = "name: s\nquestion: why?\nrecipe: recipe.yaml\nmethods: [dpo]\nmetric: chosen_logp\n"
    studies = {
        "study": study + "grid: {methods.dpo.beta: [0.1, 0.2]}\n",
        "study-metric": study.replace("chosen_logp", "chosen_logq") + "grid: {methods.dpo.beta: [0.1, 0.2]}\n",
        "study-method": study.replace("[dpo]", "[dpo, dop]") + "grid: {methods.dpo.beta: [0.1, 0.2]}\n",
        "study-key": study + "gird: {methods.dpo.beta: [0.1, 0.2]}\n",
        "study-option": study + "grid: {methods.dpo.betta: [0.1, 0.2]}\n",
        "study-value": study + "grid: {methods.dpo.beta: [0.1, -0.2]}\n",
        "study-recipe": study.replace("recipe.yaml", "nowhere.yaml") + "grid: {methods.dpo.beta: [0.1]}\n",
        "study-empty": study,
        "study-trusting": study + "overrides: {model.trust_remote_code: true}\ngrid: {methods.dpo.beta: [0.1]}\n",
        "study-grid": study + "grid: {methods.dpo.beta: 0.1}\n",
        "study-log": study + "grid: {training.weight_decay: [0, 0.1]}\nx: training.weight_decay\nx_scale: log\n",
    }
    for name, text in studies.items():
        (directory / f"{name}.yaml").write_text(text)


def write_runs(directory: Path) -> None:
    for name, text in {
        "run-broken": "{",
        "run-list": "[]",
        "run-empty": '{"methods": {}}',
        "run-scores": '{"methods": {"dpo": 3}}',
        "run-deep": "[" * 100_000,
        "run-good": '{"methods": {"dpo": {"reward": 1.0}}}',
    }.items():
        (directory / name).mkdir()
        (directory / name / "results.json").write_text(text)


def write_judging(directory: Path) -> None:
    question = {"question_id": 1, "category": "math", "turns": ["one?", "two?"]}
    answer = {"question_id": 1, "choices": [{"turns": ["one.", "two."]}]}
    write_jsonl(directory / "questions.jsonl", [question])
    write_jsonl(directory / "turnless.jsonl", [question, question | {"question_id": 2, "turns": "one?"}])
    write_jsonl(directory / "category.jsonl", [question | {"category": 1}])
    write_jsonl(directory / "same-id.jsonl", [question, question])
    write_jsonl(directory / "list-id.jsonl", [question | {"question_id": [1]}])
    write_jsonl(directory / "half-turn.jsonl", [question | {"turns": ["half a \ud800 character"]}])
    degrees = {"word": "hot", "null": None, "true": True, "below": -1, "nan": math.nan, "huge": 10**999}
    for name, degree in degrees.items():
        write_jsonl(directory / f"temperature-{name}.jsonl", [question | {"required_temperature": degree}])
    write_jsonl(directory / "answers.jsonl", [answer])
    write_jsonl(directory / "answers-other.jsonl", [answer | {"question_id": 7}])
    write_jsonl(directory / "answers-short.jsonl", [answer | {"choices": []}])
    names = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")
    places = "{question} {answer} {ref_answer_1} {ref_answer_2} {question_1} {question_2} {answer_1} {answer_2}"
    write_jsonl(directory / "prompts.jsonl", [{"name": name, "prompt_template": places} for name in names])
    for key, value in {"name": ["x"], "prompt_template": 3, "system_prompt": 3}.items():
        write_jsonl(directory / f"prompts-{key}.jsonl", [{"name": "x", "prompt_template": "x"} | {key: value}])
    write_jsonl(directory / "outputs.jsonl", [{"instruction": "a", "output": "b"}])
    write_jsonl(directory / "outputs-other.jsonl", [{"instruction": "z", "output": "b"}])
    write_jsonl(directory / "outputs-number.jsonl", [{"instruction": "a", "output": 3}])
    (directory / "placeless.txt").write_text("Compare {output_1} and {output_2}.")
    (directory / "latin.txt").write_bytes("{instruction} {output_1} {output_2} café".encode("latin-1"))
    (directory / "prompt.txt").write_text("For {instruction}, compare {output_1} and {output_2}.")


def write_all(directory: Path, make_model: Any, tokenizer: Any, pairs: Any) -> None:
    write_data(directory, pairs)
    write_models(directory, make_model, tokenizer)
    write_stores(directory)
    write_settings(directory)
    write_runs(directory)
    write_judging(directory)
