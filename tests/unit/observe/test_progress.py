"""Progress: plain lines without a terminal, a bar on one, silence on other ranks."""

import io
import os
import pty

from r1mega.observe.progress import StageProgress


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


def test_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    controller, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stream, StageProgress("zero", 4, stream=stream) as progress:
        for step in range(1, 5):
            progress.advance(step, accuracy=step / 5, length=12.0)
        progress.note("[done]")
    shown = b""
    while True:
        try:
            shown += os.read(controller, 65536)
        except OSError:  # the terminal's end: all was read
            break
    os.close(controller)
    text = shown.decode()
    assert "\x1b[" in text and "4/4" in text and "accuracy 0.800  length 12.0" in text and "[done]" in text
