"""Where results may not go, for a user without the rights: the superuser's are taken from a process of its own."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from prefdistill.core.errors import UserError
from prefdistill.core.files import atomic_path
from prefdistill.core.paths import check_own
from prefdistill.models.scratch import random_model

PLACES = ["shown", "shown/x.jsonl", "hidden/x.jsonl"]  # a directory that can be read, in it, in one that cannot be seen
COMMANDS = {
    "doctor --data pairs.jsonl --student model --json --out": PLACES,
    "doctor --json --data": PLACES[2:],
    "signals --data pairs.jsonl --model model --out": PLACES,
    "distill --data pairs.jsonl --student model --method dpo --out": PLACES,
    "sample --data pairs.jsonl --model model --out": PLACES[1:],
}
CALL = """
import contextlib, io, json, sys
from prefdistill.cli import main
told = []
for line in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(line)
    told.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(told))
"""


@pytest.fixture
def without_rights(tmp_path):
    """Runs commands with the rights of the files alone."""
    before = []
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("the superuser may write anywhere, and there is no setpriv to take that away")
        before = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]

    def run(*lines):
        asked = json.dumps([line.split() for line in lines])
        done = subprocess.run(
            [*before, sys.executable, "-c", CALL], cwd=tmp_path, input=asked, capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout.splitlines()[-1])

    hidden, shown = tmp_path / "hidden", tmp_path / "shown"
    hidden.mkdir(mode=0o000)
    shown.mkdir(mode=0o555)
    yield run
    hidden.chmod(0o755)


def test_a_place_that_is_not_ours_is_said_before_anything_is_done(tmp_path, tokenizer, pairs, without_rights):
    pairs.to_json(tmp_path / "pairs.jsonl")
    tokenizer.save_pretrained(tmp_path / "model")
    random_model(tokenizer, {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}, 0).save_pretrained(
        tmp_path / "model"
    )
    asked = [f"{command} {place}" for command, places in COMMANDS.items() for place in places]
    for line, (status, out, err) in zip(asked, without_rights(*asked), strict=True):
        assert status == 2, (line, out, err)
        told = next(f["message"] for f in json.loads(out)["findings"]) if out else err.removesuffix("\n")
        assert line.split()[-1] in told, line
        assert "ermission" in told, line
        assert "Error" not in told, line
        assert "\n" not in told, line
    assert [*(tmp_path / "shown").iterdir()] == []


def test_a_process_that_was_killed_at_its_first_file_keeps_nobody_out(tmp_path):
    with atomic_path(tmp_path / "environment.json") as temporary:
        left = temporary.name
    (tmp_path / "environment.json").unlink()
    (tmp_path / left).touch()
    check_own(tmp_path, ("environment.json",), "run")
    (tmp_path / ".environment.json.tmp").touch()  # somebody's own
    with pytest.raises(UserError, match="was not made by `prefdistill run`"):
        check_own(tmp_path, ("environment.json",), "run")
