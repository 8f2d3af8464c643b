"""Tiny recipes, and what to do with a run of them."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "src" / "prefdistill" / "experiment" / "recipes" / "quickstart.yaml"
TINY = [
    "data.synthetic={demonstrations: 96, teacher_pairs: 60, pairs: 40, test_prompts: 24}",
    "teacher.sft.max_steps=30",
    "teacher.dpo.max_steps=2",
    "student.sft.max_steps=30",
    "training.max_steps=3",
    "training.logging_steps=1",
    "model.scratch.teacher={hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2}",
    "model.scratch.student={hidden_size: 8, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2}",
    "orders=2",
]
SMALL = [*TINY, "orders=1"]


def stages(results):
    """Return whether each stage of a run was reused, by name."""
    return {stage["name"]: stage["reused"] for stage in results["stages"]}


def rebuilt(results):
    """Return the names of the stages of a run that were not reused."""
    return {name for name, reused in stages(results).items() if not reused}


def stop(*_, **__):
    raise KeyboardInterrupt


def change_weights(directory):
    """Change the weights of a model, but not the name, size and times of their file."""
    file = directory / "model.safetensors"
    times, content = file.stat(), bytearray(file.read_bytes())
    content[-2:] = b"\x80\x3f"  # 1.0
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
