"""Progress: plain lines without a terminal, one that draws on one, silence on other ranks and where it is asked for."""

import io
import math
import os
import pty
import re

import pytest

from r1mega.observe.progress import QUIET, StageProgress, sparkline, tell


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_plain_lines_every_interval():
    clock, stream = Clock(), io.StringIO()
    with StageProgress("zero", 100, done=10, interval_seconds=10, stream=stream, clock=clock) as progress:
        for step in range(11, 101):
            clock.now += 1.5
            progress.advance(step, accuracy=step / 100, length=21.26 if step == 11 else None)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "zero 11/100  accuracy 0.110  length 21.3  1.50 s/step  elapsed 0:02, left 2:14"
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [*range(11, 100, 7), 100]
    assert lines[-1] == "zero 100/100  accuracy 1.000  length 21.3  1.50 s/step  elapsed 2:15"


def test_live_numbers_of_metrics():
    stream = io.StringIO()
    with StageProgress("base", 9, stream=stream, clock=Clock()) as progress:
        progress.update(3, {"train/loss": 0.25, "reward/accuracy": None, "policy/kl": 1.0})
    assert stream.getvalue() == "base 3/9  loss 0.250  0.00 s/step  elapsed 0:00, left 0:00\n"


def test_other_ranks_are_silent():
    stream = io.StringIO()
    with StageProgress("zero", 2, rank=1, stream=stream) as progress:
        progress.advance(1, accuracy=0.5)
        progress.note("hello")
    assert stream.getvalue() == ""


def test_notes_are_lines():
    stream = io.StringIO()
    with StageProgress("zero", 2, stream=stream) as progress:
        progress.note("report: [run]/report.html")
    assert stream.getvalue() == "report: [run]/report.html\n"


def shown_on_a_terminal(monkeypatch, columns, term="xterm-256color", steps=range(1, 49), length=12.0):
    """The lines of a stage that gets better, as a terminal gets them."""
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", str(columns))
    controller, terminal = pty.openpty()
    with (
        os.fdopen(terminal, "w", encoding="utf-8") as stream,
        StageProgress("reasoning_rl", steps[-1], stream=stream) as progress,
    ):
        for step in steps:
            progress.advance(step, accuracy=step / 60, length=length)
        progress.note("[done]")
    shown = b""
    while True:
        try:
            shown += os.read(controller, 65536)
        except OSError:  # the terminal's end: all was read
            break
    os.close(controller)
    return [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in re.split("[\r\n]+", shown.decode())]


@pytest.mark.parametrize(
    "columns, drawn, seconds, bar",
    [
        (80, "accuracy 0.800 ▁▃▄▅▆  length 12.0 █████", False, False),
        (120, "accuracy 0.800 ▁▁▂▂▂▃▃▄▄▄▅▅▆▆▆▇  length 12.0 ████████████████", True, False),
        (160, "accuracy 0.800 ▁▁▂▂▂▃▃▄▄▄▅▅▆▆▆▇  length 12.0 ████████████████", True, True),
        (60, "accuracy 0.800 ▁▃▅▆ 0:", False, False),
    ],
)
def test_course_on_a_terminal(monkeypatch, columns, drawn, seconds, bar):
    """What a person sees grow: on one line of the terminal, whatever its width."""
    lines = shown_on_a_terminal(monkeypatch, columns)
    (last,) = [line for line in lines if "48/48" in line]
    assert drawn in last and len(last.rstrip()) <= columns and "left" in last
    assert ("s/step" in last) == seconds and ("━" in last) == bar
    assert "[done]" in lines


@pytest.mark.parametrize("steps, length", [(range(9990, 9999), 123.4), (range(9000, 9999), 31234.5)])
def test_nothing_is_cut(monkeypatch, steps, length):
    (last,) = [line for line in shown_on_a_terminal(monkeypatch, 80, steps=steps, length=length) if "9998/9998" in line]
    assert re.fullmatch(
        rf"reasoning_rl 9998/9998 accuracy 166\.6 \S+  length {length} \S+ 0:00:0\d left \S+", last.strip()
    )
    assert "…" not in last and len(last.rstrip()) <= 80


def test_color_makes_no_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    with StageProgress("zero", 2, stream=stream, clock=Clock()) as progress:
        progress.advance(2, accuracy=0.5)
    assert stream.getvalue() == "zero 2/2  accuracy 0.500  0.00 s/step  elapsed 0:00\n"


@pytest.mark.parametrize("length", [math.nan, math.inf])
def test_a_number_that_is_none_is_told_and_not_drawn(monkeypatch, length):
    (last,) = [line for line in shown_on_a_terminal(monkeypatch, 80, length=length) if "48/48" in line]
    assert f"length {length}" in last and "left" in last


def test_terminal_that_cannot_draw(monkeypatch):
    lines = shown_on_a_terminal(monkeypatch, 160, term="dumb")
    assert lines[0].startswith("reasoning_rl 1/48  accuracy 0.017  length 12.0") and not set("▁█━") & set(
        "".join(lines)
    )


def test_sparkline():
    assert sparkline([], 8) == "" and sparkline([1.0], 0) == ""
    assert sparkline([0.0, 0.0], 8) == "▁▁"
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8, 8.0) == "▁▂▃▄▅▆▇█"
    assert sparkline([1, 3, 5, 7, 7], 2, 8.0) == "▃▇", "means of 1 3 (2) and 5 7 7 (6.3)"
    assert sparkline([-1.0, float(2**40)], 8, 1.0) == "▁█"
    assert sparkline([1.0, math.nan, math.inf], 8, 1.0) == "█" and sparkline([math.nan], 8) == ""


def test_quiet(monkeypatch, capfd):
    monkeypatch.setenv(QUIET, "1")
    stream = io.StringIO()
    with StageProgress("zero", 2, stream=stream) as progress:
        progress.advance(2, accuracy=0.5)
        progress.note("hello")
    tell("hello")
    assert stream.getvalue() == "" and capfd.readouterr() == ("", "")
    monkeypatch.setenv(QUIET, "0")
    tell("hello")
    assert capfd.readouterr().out == "hello\n"
