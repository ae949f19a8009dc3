"""What a runtime measures of a run."""

from contextlib import nullcontext
from types import SimpleNamespace

from r1mega.stages import runtime as module


def test_the_end_of_a_save_beside_the_steps_counts_for_the_warning(monkeypatch):
    clock = iter([10.0, 17.5])
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    run = SimpleNamespace(
        _store=SimpleNamespace(wait=lambda: None),
        busy_with=lambda _: nullcontext(),
        _save_seconds=0.5,
        _step_seconds=4.0,
    )
    module.Runtime._finish_saves(run)
    assert "saves 8.0 s: warn it 18 s before its end" in module.Runtime._warning(run)
