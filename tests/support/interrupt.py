"""Interrupt a training, as Ctrl-C does."""

import signal

from transformers import TrainerCallback


class StopAt(TrainerCallback):
    """Interrupts at the end of a step; with None, never."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            signal.raise_signal(signal.SIGINT)
