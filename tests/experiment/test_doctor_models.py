"""Doctor checks of vocabularies, tokenizers and weights."""

import json

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import normalizers

from prefdistill import METHODS, LiveTeacher
from prefdistill.cli import main
from prefdistill.data.load import load_pairs
from prefdistill.data.truncation import Truncation
from prefdistill.experiment.doctor import as_text, examine, vocabulary
from prefdistill.experiment.recipe import load_recipe
from prefdistill.models.load import load_tokenizer
from prefdistill.signals import extract_signals
from prefdistill.training.rows import prepare_rows
from support.doctor import (
    GENERATE,
    HEADER,
    LONG,
    SYSTEM,
    TAIL,
    checks_found,
    clean,
    copy_of,
    edited,
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
    ("another tokenizer", lambda _: make_tokenizer("chatml"), {}, "vocabulary.other-tokens", "note"),
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
    assert checks_found(checkup) == ({check} if severity != "note" else set())


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


def test_a_teacher_with_other_tokens_names_the_methods_that_can_learn_from_it(tmp_path, tokenizer):
    other = make_tokenizer("chatml")
    student, teacher = model_of(tokenizer, tmp_path / "a"), model_of(other, tmp_path / "b")
    finding = finding_of(examine(student=student, teacher=teacher), "vocabulary.other-tokens")
    a, b = tokenizer.get_vocab(), other.get_vocab()
    assert finding.count == sum(a[t] != b[t] if t in b else a[t] in b.values() for t in a)
    assert finding.of == len(a)
    works, refused = (part.rpartition(": ")[2].split(", ") for part in finding.message.split("; ")[1:])
    assert {"tvkd", "dadpo", "seqkd"} <= set(works)
    assert {"vanillakd", "dckd", "adpa", "distillm2"} <= set(refused)
    assert set(works).isdisjoint({*refused, "dpo"})


def test_a_recipe_is_refused_with_all_its_methods_on_distributions(tmp_path, tokenizer):
    teacher = model_of(make_tokenizer("chatml"), tmp_path / "teacher")
    recipe = recipe_for(tmp_path, tokenizer, f"model.teacher={teacher}", "methods.adpa={}")
    finding = finding_of(examine(recipe=recipe), "vocabulary.other-tokens")
    assert finding.severity == "error"
    assert finding.message.endswith("refused: dckd, adpa")
    assert "tvkd" in finding.fix
    recipe = load_recipe(tmp_path / "recipe.yaml", [f"model.teacher={teacher}", "teacher.dpo=null"], only=["tvkd"])
    assert finding_of(examine(recipe=recipe), "vocabulary.other-tokens").severity == "note"


def across_rows():
    """Rows that tokenizers with other merges, a normal form or another end of the text cannot share."""
    rows = edited({1: {"chosen": "ﬁne words"}, 4: {"prompt": "not <|im_end|> yet"}, 5: {"rejected": "a word " * 30}})
    rows[7]["chosen"] = [*rows[7]["chosen"], *rows[7]["chosen"]]
    return rows


def test_what_the_doctor_says_of_a_teacher_with_other_tokens_is_what_the_run_drops(tmp_path, tokenizer):
    other = copy_of(make_tokenizer("chatml"), tmp_path)
    other.backend_tokenizer.normalizer = normalizers.NFKC()
    student, teacher = model_of(tokenizer, tmp_path / "student"), model_of(other, tmp_path / "teacher")
    source, limit = write(tmp_path / "pairs.jsonl", across_rows()), Truncation(150)
    checkup = examine(source, student=student, teacher=teacher, truncation=limit)
    pairs = load_pairs(source)
    store = extract_signals(teacher, pairs, kinds=("values",), out=tmp_path / "store", truncation=limit)
    start = LiveTeacher(student, "reference", ("logps",), dataset=pairs, truncation=limit).bind()
    *_, reading = prepare_rows(pairs, METHODS["tvkd"](), [store, start], load_tokenizer(student), limit)
    facts = checkup.facts["train"]["teacher"]["aligned"]
    assert facts["dropped"] == reading.dropped.counts
    assert facts["kept"] == reading.kept == 9
    assert 0.1 < facts["shared_states"] < 0.9
    found = {f.check: (f.severity, f.rows) for f in checkup.findings if f.check.startswith("across.")}
    assert found == {
        "across.changed-text": ("warning", (1,)),
        "across.cut-elsewhere": ("warning", (5,)),
        "across.no-text": ("warning", (7,)),
    }
    assert finding_of(checkup, "across.changed-text").example == "row 1: chosen: ﬁne words"
    special = finding_of(checkup, "tokens.special-in-text")  # of the teacher only
    assert special.message.startswith("teacher: ")
    assert special.rows == (4,)
    assert checkup.ok
    assert f"{facts['shared_states']:.1%} of the student's states; 9 of 12 rows are left" in " ".join(
        as_text(checkup).split()
    )


def test_a_teacher_that_can_serve_no_row_is_an_error(tmp_path, tokenizer):
    other = templated(HEADER + "{% endfor %}" + GENERATE)(copy_of(make_tokenizer("chatml"), tmp_path))  # no end token
    student, teacher = model_of(tokenizer, tmp_path / "student"), model_of(other, tmp_path / "teacher")
    source = write(tmp_path / "pairs.jsonl", clean())
    checkup = examine(source, student=student, teacher=teacher, truncation=LONG)
    finding = finding_of(checkup, "across.ends-differ")
    assert (finding.severity, finding.count) == ("error", 12)
    assert checkup.facts["train"]["teacher"]["aligned"]["shared_states"] is None
    assert finding_of(checkup, "template.no-end").message.startswith("teacher: ")


def test_a_teacher_without_a_template_reads_in_the_form_that_is_named(tmp_path, tokenizer, capsys):
    other = copy_of(make_tokenizer("chatml"), tmp_path, chat_template=None)
    student, teacher = model_of(tokenizer, tmp_path / "student"), model_of(other, tmp_path / "teacher")
    command = ["doctor", "--data", write(tmp_path / "pairs.jsonl", clean()), "--teacher", teacher, "--student", student]
    assert main([*command, "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    (missing,) = [f for f in told["findings"] if f["check"] == "template.missing"]
    assert missing["message"].startswith("teacher: ")
    assert "--teacher-chat-template" in missing["fix"]
    assert main([*command, "--json", "--teacher-chat-template", "plain"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["facts"]["train"]["teacher"]["aligned"]["kept"] == 12


@pytest.mark.parametrize("form", [("--teacher-tokenizer", "wrong"), ("--teacher-chat-template", "missing.jinja")])
def test_a_teacher_that_cannot_be_read_as_named_is_one_error(tmp_path, tokenizer, capsys, form):
    student, teacher = (model_of(tokenizer, tmp_path / name) for name in ("student", "teacher"))
    make_tokenizer("chatml").save_pretrained("wrong")
    data = write(tmp_path / "pairs.jsonl", clean())
    assert main(["doctor", "--data", data, "--teacher", teacher, "--student", student, *form, "--json"]) == 2
    findings = [f for f in json.loads(capsys.readouterr().out)["findings"] if f["severity"] != "note"]
    assert [finding["check"] for finding in findings] == ["model.tokenizer"]  # and nothing of two vocabularies
    assert "leave it out" in findings[0]["fix"]


def test_a_student_of_fewer_layers_needs_no_recipe(tmp_path, tokenizer, capsys):
    whole = model_of(tokenizer, tmp_path / "whole", num_hidden_layers=2)
    command = ["doctor", "--data", write(tmp_path / "pairs.jsonl", clean()), "--json", "--student"]
    assert main([*command, whole]) == 0
    of_whole = json.loads(capsys.readouterr().out)["facts"]["models"]["student"]["parameters"]
    assert main([*command, f"{{from: {whole}, layers: 1}}"]) == 0
    assert json.loads(capsys.readouterr().out)["facts"]["models"]["student"]["parameters"] < of_whole
    assert main([*command, f"{{form: {whole}, layers: 1}}"]) == 2
    assert "did you mean 'from'?" in capsys.readouterr().err


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
