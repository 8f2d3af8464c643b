"""The report as markdown, and writing it to a file."""

import re
from pathlib import Path

import pytest

from prefdistill.core.errors import UserError
from prefdistill.report import render_markdown, write_report
from support.runs import small_run


def test_markdown(run: Path) -> None:
    text = render_markdown([run])
    assert text.startswith("# quickstart\n\n**TVKD came out ahead of DPO")
    assert "| tvkd | 3.069 ± 0.150 | +0.039 ± 0.010 |" in text
    assert "> [!WARNING]" in text
    assert "| teacher-sft | 3 | 1 min 34 s | 900 MiB | 134 MiB | 1 of 3 reused |" in text
    assert "```yaml\nname: quickstart" in text
    assert "| train | 1,200 | pairs.jsonl | source, margin |" in text
    dropped = "9: the prompt leaves no room; 1: chosen and rejected are equal"
    assert f"| train, seed 0 | 1,200 | 1,190 | {dropped} | 0 | 31 |" in text


def test_markdown_of_hostile_text(evil_run: Path) -> None:
    text = render_markdown([evil_run])
    prose = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in prose
    assert "<img" not in prose
    assert "alert(2)" not in prose  # a response that holds a fence stays inside its own
    assert "![" not in prose.replace("[!WARNING]", "")


def test_write_report(evil_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "report.html"
    assert write_report([evil_run], out.with_suffix(".md"), format="md")  # a lone surrogate does not stop it
    assert "Samples" in out.with_suffix(".md").read_text(encoding="utf-8")
    for run in (evil_run, small_run(tmp_path)):  # the second takes the place of the first
        assert write_report([run], out) == out
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert sorted(p.name for p in out.parent.iterdir()) == ["report.html", "report.md"]
    with pytest.raises(UserError, match='unknown report format "pdf"'):
        write_report([evil_run], out, format="pdf")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="cannot be written"):
        write_report([evil_run], out / "below-a-file.html", format="md")
