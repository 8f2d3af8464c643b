"""Doctor checks of vocabularies, tokenizers and weights."""

import json

import pytest
from safetensors.torch import load_file, save_file

from prefdistill.experiment.doctor import examine, vocabulary
from support.doctor import (
    GENERATE,
    HEADER,
    LONG,
    SYSTEM,
    TAIL,
    checks_found,
    clean,
    copy_of,
    finding_of,
    model_of,
    more_tokens,
    other_pieces,
    recipe_for,
    templated,
    text_of,
    with_eos,
    write,
)
from support.tokenizer_styles import make_tokenizer

pytestmark = pytest.mark.usefixtures("in_tmp_path")


VOCABULARIES = [
    ("another tokenizer", lambda _: make_tokenizer("chatml"), {}, "vocabulary.conflict", "error"),
    ("more tokens", more_tokens, {}, "vocabulary.extra", "note"),
    ("another EOS", with_eos, {}, "vocabulary.special", "warning"),
    ("another template", templated(HEADER + TAIL + "{{ '' }}" + GENERATE), {}, "vocabulary.template", "warning"),
    ("other pieces", other_pieces, {}, "vocabulary.reading", "warning"),
    ("padded rows", lambda t: t, {"vocab_size": 384}, "vocabulary.rows-padded", "note"),
    ("too few rows", lambda t: t, {"vocab_size": 300}, "vocabulary.rows-missing", "error"),
    ("too few positions", lambda t: t, {"max_position_embeddings": 30}, "model.positions", "error"),
]


@pytest.mark.parametrize(
    ("change", "shape", "check", "severity"), [c[1:] for c in VOCABULARIES], ids=[c[0] for c in VOCABULARIES]
)
def test_each_vocabulary_check_finds_its_difference(tmp_path, tokenizer, change, shape, check, severity):
    student = model_of(tokenizer, tmp_path / "student")
    teacher = model_of(change(copy_of(tokenizer, tmp_path)), tmp_path / "teacher", **shape)
    checkup = examine(write(tmp_path / "pairs.jsonl", clean()), student=student, teacher=teacher, truncation=LONG)
    assert finding_of(checkup, check).severity == severity
    also = {"vocabulary.special", "vocabulary.template"} if check == "vocabulary.conflict" else set()
    assert checks_found(checkup) - also == ({check} if severity != "note" else set())


def test_different_tokenization_names_rows_of_the_data_if_some_are_refused(tmp_path):
    rows = [*SYSTEM[:2], *clean()[2:4]]  # trains and rivers
    student = make_tokenizer("gemma")
    teacher = other_pieces(copy_of(student, tmp_path), at="v")
    models = [model_of(student, tmp_path / "student"), model_of(teacher, tmp_path / "teacher")]
    finding = finding_of(
        examine(write(tmp_path / "pairs.jsonl", rows), None, models[1], models[0]), "vocabulary.reading"
    )
    assert (finding.rows, finding.count, finding.of) == ((3,), 1, 2)
    assert finding.example == f"row 3: {text_of(rows[3]['chosen'])}"


def test_a_vocabulary_conflict_counts_the_differing_tokens(tmp_path, tokenizer):
    other = make_tokenizer("chatml")
    student, teacher = model_of(tokenizer, tmp_path / "a"), model_of(other, tmp_path / "b")
    finding = finding_of(examine(student=student, teacher=teacher), "vocabulary.conflict")
    a, b = tokenizer.get_vocab(), other.get_vocab()
    assert finding.count == sum(a[t] != b[t] if t in b else a[t] in b.values() for t in a)
    assert finding.of == len(a)


def test_the_teachers_template_is_used_if_the_student_has_none(tmp_path, tokenizer):
    student = model_of(copy_of(tokenizer, tmp_path, chat_template=None), tmp_path / "student")
    teacher = model_of(tokenizer, tmp_path / "teacher")
    checkup = examine(write(tmp_path / "pairs.jsonl", clean()), student=student, teacher=teacher, truncation=LONG)
    assert finding_of(checkup, "template.from-teacher").severity == "note"
    assert checks_found(checkup) == set()
    assert checkup.facts["train"]["kept"]["pairs"] == 12


def test_a_missing_model_or_tokenizer_is_a_finding(tmp_path, tokenizer):
    source = write(tmp_path / "pairs.jsonl", clean())
    assert checks_found(examine(source, student=str(tmp_path / "nowhere"))) == {"model.shape"}
    model_of(tokenizer, tmp_path / "bare")
    for path in (tmp_path / "bare").glob("*token*"):
        path.unlink()
    assert checks_found(examine(source, student=str(tmp_path / "bare"))) == {"model.tokenizer"}
    tokenizer.save_pretrained(tmp_path / "headless")
    assert checks_found(examine(source, student=str(tmp_path / "headless"))) == {"model.shape"}


def remove_head(file):
    save_file({name: value for name, value in load_file(file).items() if name != "lm_head.weight"}, file)


WEIGHTS = {
    "none": (lambda file: file.unlink(), "no file named model.safetensors"),
    "cut": (lambda file: file.write_bytes(file.read_bytes()[:-100]), "incomplete metadata, file not fully covered"),
    "no head": (remove_head, "1 weights are missing, the first is lm_head.weight"),
}


@pytest.mark.parametrize(("damage", "message"), WEIGHTS.values(), ids=WEIGHTS)
def test_damaged_weights_are_a_finding(tmp_path, tokenizer, damage, message):
    whole, damaged = (model_of(tokenizer, tmp_path / name) for name in ("whole", "damaged"))
    damage(tmp_path / "damaged" / "model.safetensors")
    for role in ("student", "teacher"):
        assert checks_found(examine(**{role: whole})) == set()
        finding = finding_of(examine(**{role: damaged}), "model.weights")
        assert finding.severity == "error"
        assert finding.message.startswith(f"{role}: {damaged} exists but holds no model")
        assert message in finding.message
    recipe = recipe_for(tmp_path, tokenizer, f"model.student={damaged}")
    assert checks_found(examine(recipe=recipe)) == {"model.weights"}
    recipe = recipe_for(tmp_path, tokenizer, "teacher.dpo=null", f"model.teacher_reference={damaged}")
    assert finding_of(examine(recipe=recipe), "model.weights").message.startswith("teacher reference: ")


def test_a_tokenizer_that_is_loaded_unlike_its_file_is_found(tmp_path, tokenizer):
    source, model = write(tmp_path / "pairs.jsonl", clean()), model_of(tokenizer, tmp_path / "model")
    assert "vocabulary.unlike-file" not in checks_found(examine(source, student=model))
    file = tmp_path / "model" / "tokenizer.json"
    rules = json.loads(file.read_text())
    rules["normalizer"] = {"type": "Lowercase"}
    without_file = [*vocabulary.same_as_file("student", tokenizer, None, ["A"])]
    file.write_text(json.dumps(rules))
    (finding,) = vocabulary.same_as_file("student", tokenizer, file, ["a b", "Words", "in Paris"])
    assert (without_file, finding.count > 2, finding.of) == ([], True, len(vocabulary.PROBES) + 3)
    file.write_text("{")
    assert [*vocabulary.same_as_file("student", tokenizer, file, ["A"])] == []


@pytest.mark.parametrize(
    ("modules", "names"),
    [
        ("[q_proj, lm_head]", "lm_head,"),
        ("[embed_tokens]", "model.embed_tokens,"),
        ("[q_proj]", ""),
        ("all-linear", ""),
    ],
)
def test_an_adapter_on_the_head_is_found(tmp_path, tokenizer, modules, names):
    recipe = recipe_for(tmp_path, tokenizer, f"methods.dpo.training.lora.target_modules={modules}")
    findings = [f for f in examine(recipe=recipe).findings if f.check == "recipe.lora-head"]
    assert [f.message.partition(" a row for")[0] for f in findings] == (
        [f"methods.dpo.training: the adapter is on {names}"] if names else []
    )
