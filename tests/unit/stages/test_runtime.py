"""What a runtime measures of a run."""

import json
import math
from contextlib import contextmanager, nullcontext, suppress
from types import SimpleNamespace

import pytest

from r1mega.config.load import load_config
from r1mega.errors import DataError, NonFiniteError
from r1mega.observe.run import RunDirectory
from r1mega.stages import runtime as module
from tests.processes import REPOSITORY


@pytest.mark.parametrize(("counted", "saves"), [(0.0, 8.0), (7.0, 8.0), (9.0, 9.5)])
def test_the_end_of_a_save_beside_the_steps_counts_for_the_warning(monkeypatch, counted, saves):
    """What is left of it at the end; once: an earlier one's may be among the seconds of a save already."""
    clock = iter([10.0, 17.5])
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    run = SimpleNamespace(
        _store=SimpleNamespace(wait=lambda: None, background_seconds=counted),
        busy_with=lambda _: nullcontext(),
        _save_seconds=0.5 + counted,
        _step_seconds=4.0,
    )
    module.Runtime._finish_saves(run)
    run._wanted_warning = lambda: module.Runtime._wanted_warning(run)
    warning = math.ceil(1.5 * (4.0 + saves))
    assert f"saves {saves} s: warn it {warning} s before its end" in module.Runtime._warning(run)


def test_each_save_says_how_long_a_warning_the_run_wants(monkeypatch, tmp_path):
    """Not before the first step of a start: a job is to get on with each."""
    clock = iter([10.0, 12.0, 20.0, 26.5, 30.0, 31.0])
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    run = SimpleNamespace(
        _store=SimpleNamespace(save=lambda *_: None, background_seconds=0.0), busy_with=lambda _: nullcontext(), _save_seconds=0.0,
        _step_seconds=0.0, is_main=True, directory=RunDirectory(tmp_path),
    )  # fmt: skip
    run._wanted_warning = lambda: module.Runtime._wanted_warning(run)
    trainer = SimpleNamespace(sharded_state=lambda is_loading: {})
    module.Runtime.save(run, trainer, 0, {})
    assert not run.directory.pace.exists()
    run._step_seconds = 4.0
    module.Runtime.save(run, trainer, 1, {})
    assert run.directory.read_pace() == {"step_seconds": 4.0, "save_seconds": 6.5, "warning_seconds": 16}
    run._store.background_seconds = 10.0  # what the thread of an asynchronous save took is waited for at a stop
    module.Runtime.save(run, trainer, 2, {})
    assert run.directory.read_pace() == {"step_seconds": 4.0, "save_seconds": 11.0, "warning_seconds": 23}


class Said(Exception):
    pass


def test_no_job_is_warned_by_the_pace_of_an_earlier_start(monkeypatch, tmp_path):
    """It is gone before the job's script is told where the run directory is, long before the first step."""
    directory = RunDirectory(tmp_path)
    directory.write_pace(1.0, 1.0, 3)

    def say_place(self):
        raise Said(self.pace.exists())

    monkeypatch.setattr(RunDirectory, "say_place", say_place)
    with pytest.raises(Said) as said, module.Runtime.open(alone(monkeypatch, tmp_path)):
        pass
    assert said.value.args == (False,)


def alone(monkeypatch, run_dir):
    """The config of a run without process groups."""
    monkeypatch.setattr(module.groups, "init_parallel", lambda *_: None)
    monkeypatch.setattr(module.groups, "destroy", lambda: None)
    monkeypatch.setattr(module.torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(module.processors, "own_share", lambda: 1)
    monkeypatch.setattr(module, "record_collectives", lambda _: None)
    monkeypatch.setattr(module.dist, "get_rank", lambda: 0)
    return load_config(REPOSITORY / "configs/nano/zero.yaml", [f"run_dir={json.dumps(str(run_dir))}"])


def test_a_run_is_watched_until_all_is_closed(monkeypatch, tmp_path):
    """NCCL's recorder reads its variables when the groups are made; what closes them may wait for a rank that is dead."""
    config, order = alone(monkeypatch, tmp_path), []

    def note(name):
        return lambda *_, **__: order.append(name)

    @contextmanager
    def watchdog(self):
        order.append("watched")
        yield
        order.append("watched no more")

    for where, name in (
        (module, "record_collectives"), (module.groups, "init_parallel"), (module.groups, "destroy"), (module, "check_inputs"),
        (module, "record_inputs"),
    ):  # fmt: skip
        monkeypatch.setattr(where, name, note(name))
    monkeypatch.setattr(module.Runtime, "broadcast", lambda self, make: make())
    monkeypatch.setattr(module.Runtime, "_watchdog", watchdog)
    with module.Runtime.open(config):
        order.append("run")
    assert order == [
        "record_collectives", "init_parallel", "watched", "check_inputs", "record_inputs", "run", "destroy", "watched no more",
    ]  # fmt: skip


@pytest.mark.parametrize(("threads", "chosen"), [("null", 12), ("3", 3)])
def test_a_rank_computes_on_its_share_of_the_processors(monkeypatch, tmp_path, threads, chosen):
    alone(monkeypatch, tmp_path)
    config = load_config(
        REPOSITORY / "configs/nano/zero.yaml", [f"run_dir={json.dumps(str(tmp_path))}", f"threads={threads}"]
    )
    monkeypatch.setattr(module.processors, "own_share", lambda: 12)
    monkeypatch.setattr(module.torch, "set_num_threads", lambda count: (_ for _ in ()).throw(Said(count)))
    with pytest.raises(Said) as said, module.Runtime.open(config):
        pass
    assert said.value.args == (chosen,)


def test_a_step_tells_of_the_slowest_rank_and_the_fullest_device(monkeypatch):
    def gather(whole, own):
        whole[: len(own)], whole[len(own) :] = own, 2 * own  # rank 1 has twice of all

    monkeypatch.setattr(module.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(module.dist, "all_gather_into_tensor", gather)
    monkeypatch.setattr(module, "device_used_bytes", lambda: 5 << 30)
    run = SimpleNamespace(
        _here=SimpleNamespace(name="cuda"), peak_tflops=None, timer=SimpleNamespace(take_peaks=lambda: {"memory/update_host_peak_bytes": 7})
    )  # fmt: skip
    told = module.Runtime._performance(run, {"time/update_seconds": 1.5})
    assert told["memory/device_used_bytes"] == 10 << 30 and told["memory/update_host_peak_bytes"] == 14
    assert [told[f"straggler/update_{name}"] for name in ("worst_rank", "worst_seconds", "median_seconds")] == [1, 3.0, 2.25]  # fmt: skip


def test_what_all_ranks_find_is_told_by_the_first_alone(monkeypatch, tmp_path):
    """Also where its end, with the launcher's signals, meets the others while they close."""
    told = []
    monkeypatch.setattr(module.StopRequest, "decide", lambda self, code, text="": told.append((code, text)))
    monkeypatch.setattr(module.Runtime, "broadcast", lambda self, make: make())
    monkeypatch.setattr(module.Runtime, "_watchdog", lambda self: nullcontext())
    for name in ("check_inputs", "record_inputs"):
        monkeypatch.setattr(module, name, lambda *_, **__: None)
    config = alone(monkeypatch, tmp_path)
    for rank in "01":
        for name in ("RANK", "LOCAL_RANK"):
            monkeypatch.setenv(name, rank)
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.setenv(name, "2")
        with suppress(DataError), module.Runtime.open(config):
            raise DataError("q.jsonl:3")
    assert told == [(3, "DataError: q.jsonl:3\n"), (3, "")]


@pytest.mark.parametrize(("end", "code"), [
    (lambda run: run.finished({}), 0), (lambda run: run.stopped(), None), (NonFiniteError("inf"), 9), (OSError(28, "full"), 11),
    (ConnectionResetError(104, "by peer"), 1), (RuntimeError("gloo/transport: Connection closed by peer"), 10), (KeyError("x"), 1),
    (KeyboardInterrupt(), 130),
], ids=lambda value: None if callable(value) else str(value))  # fmt: skip
def test_what_a_signal_makes_of_a_run_whose_end_is_known(monkeypatch, tmp_path, end, code):
    """None: saved, to be started again."""
    decided = []
    monkeypatch.setattr(module.StopRequest, "decide", lambda self, code, text="": decided.append(code))
    monkeypatch.setattr(module.Runtime, "broadcast", lambda self, make: make())
    monkeypatch.setattr(module.Runtime, "_watchdog", lambda self: nullcontext())
    for name in ("check_inputs", "record_inputs"):
        monkeypatch.setattr(module, name, lambda *_, **__: None)
    with suppress(BaseException), module.Runtime.open(alone(monkeypatch, tmp_path)) as run:
        if isinstance(end, BaseException):
            raise end
        end(run)
    assert decided == ([] if code is None else [code])
