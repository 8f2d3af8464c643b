"""Preference distillation for small language models: pairs -> signals -> method -> student -> evaluation -> report."""

__version__ = "0.1.0"
