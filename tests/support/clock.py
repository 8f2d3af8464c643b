"""The clock that chat templates read."""

import copy
import datetime

import transformers.utils.chat_template_utils as rendering

from prefdistill.data import encode

DATED = "{{ strftime_now('%d %B %Y') }} "


def move_clock(monkeypatch, days):
    """Set the clock to some days after 27 November 2026, and forget what this process has encoded."""

    class Moved(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2026, 11, 27 + days, tzinfo=tz)

    monkeypatch.setattr(rendering, "datetime", Moved)
    encode._CACHE.clear()


def dated(tokenizer):
    """Return a tokenizer whose template prints the date before the conversation."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = DATED + tokenizer.chat_template
    return other
