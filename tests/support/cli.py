"""Running the command line, in this process or in another."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MODEL, PAIRS, OUT = ["--model", "model"], ["--data", "pairs.jsonl"], ["--out", "out"]
FAST = ["max_steps=2", "batch_size=4", "micro_batch_size=4", "learning_rate=1e-3"]


def files(directory: Path) -> dict[Path, Any]:
    """What is in a directory, with the times of its files."""
    return {path: path.is_dir() or path.lstat().st_mtime_ns for path in Path(directory).rglob("*")}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `prefdistill` in another process."""
    return subprocess.run([sys.executable, "-m", "prefdistill", *arguments], capture_output=True, text=True)


def run_code(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


def call(capfd: Any, *arguments: str) -> tuple[dict[str, Any], str]:
    """The JSON object that a verb prints, and its messages on stderr."""
    from prefdistill.cli import main

    capfd.readouterr()
    status = main([*arguments, "--json"])
    out, err = capfd.readouterr()
    assert status == 0, err
    results = json.loads(out)
    assert isinstance(results, dict)
    assert out.count("\n") == 1
    return results, err
