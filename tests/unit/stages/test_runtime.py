"""What a runtime measures of a run."""

from contextlib import nullcontext
from types import SimpleNamespace

from r1mega.observe.run import RunDirectory
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
    run._wanted_warning = lambda: module.Runtime._wanted_warning(run)
    assert "saves 8.0 s: warn it 18 s before its end" in module.Runtime._warning(run)


def test_each_save_says_how_long_a_warning_the_run_wants(monkeypatch, tmp_path):
    """Not before the first step of a start: a job is to get on with each."""
    clock = iter([10.0, 12.0, 20.0, 26.5])
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    run = SimpleNamespace(
        _store=SimpleNamespace(save=lambda *_: None), busy_with=lambda _: nullcontext(), _save_seconds=0.0,
        _step_seconds=0.0, is_main=True, directory=RunDirectory(tmp_path),
    )  # fmt: skip
    run._wanted_warning = lambda: module.Runtime._wanted_warning(run)
    trainer = SimpleNamespace(sharded_state=lambda is_loading: {})
    module.Runtime.save(run, trainer, 0, {})
    assert not run.directory.pace.exists()
    run._step_seconds = 4.0
    module.Runtime.save(run, trainer, 1, {})
    assert run.directory.read_pace() == {"step_seconds": 4.0, "save_seconds": 6.5, "warning_seconds": 16}
