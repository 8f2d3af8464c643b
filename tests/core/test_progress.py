"""Progress in a log: a line a minute, with rate and time left."""

import prefdistill.core.progress as progress
from prefdistill.core.progress import Progress


def test_a_line_a_minute_where_there_is_no_terminal(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress("signals", total=100, unit="pair") as bar:
        for _ in range(100):
            now[0] += 2.5  # 250 seconds in all
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert "signals" in lines[0]
    assert "24/100" in lines[0]
    assert "03:10" in lines[0]  # 76 pairs left at 2.5 s each
    assert "2.50s/pair" in lines[0]


def test_what_was_done_before_does_not_count_into_the_rate(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = Progress("training", total=100, unit="step", done=90)
    now[0] = 10.0
    bar.update(5)
    assert "95/100" in bar.line()
    assert "2.00s/step" in bar.line()
