"""metrics.jsonl: exact floats, durable lines, the cut on resume; the mirrors; the table of names."""

import json
import logging
import math
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.errors import DataError, PlatformError
from r1mega.files import JsonLinesWriter, read_json_lines, write_atomic
from r1mega.observe import registry
from r1mega.observe.metrics import MetricsWriter, read_metrics

ISSUE_NAMES = (
    "step reward/mean reward/accuracy reward/format response/length_mean response/truncated_fraction policy/kl "
    "policy/clip_fraction policy/entropy policy/grad_norm logprob/diff_max logprob/diff_mean "
    "expert/load_max_over_mean time/rollout_seconds time/reward_seconds time/logprob_seconds time/update_seconds "
    "time/reshard_seconds time/step_seconds tokens/rollout_per_second tokens/update_per_second memory/rss_bytes"
).split()


def plain_writer(path, resume_step=None):
    return MetricsWriter(path, resume_step=resume_step, tensorboard=False)


@settings(deadline=None, max_examples=50)  # fsync takes what the disk takes
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
def test_floats_come_back_bitwise(values):
    with tempfile.TemporaryDirectory() as directory:
        with plain_writer(directory) as writer:
            for step, value in enumerate(values):
                writer.write(step, {"reward/mean": value})
        read = [line["reward/mean"] for line in read_metrics(directory)]
    assert [struct.pack("<d", v) for v in read] == [struct.pack("<d", v) for v in values]


def test_numbers_of_torch_and_numpy(tmp_path):
    with plain_writer(tmp_path) as writer:
        values = {"reward/mean": torch.tensor(0.1), "policy/kl": np.float32(0.3), "memory/rss_bytes": np.int64(7)}
        writer.write(1, values)
    (line,) = read_metrics(tmp_path)
    assert line == {
        "step": 1,
        "reward/mean": float(torch.tensor(0.1)),
        "policy/kl": float(np.float32(0.3)),
        "memory/rss_bytes": 7,
    }
    assert isinstance(line["memory/rss_bytes"], int)


def test_not_finite_becomes_null_with_a_warning(tmp_path, caplog):
    with plain_writer(tmp_path) as writer, caplog.at_level(logging.WARNING):
        writer.write(3, {"policy/kl": math.nan, "policy/loss": -math.inf, "reward/mean": 1.0})
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda c: pytest.fail(c)) == {
        "step": 3,
        "policy/kl": None,
        "policy/loss": None,
        "reward/mean": 1.0,
    }
    assert "policy/kl of step 3 is nan" in caplog.text and "policy/loss of step 3 is -inf" in caplog.text


@pytest.mark.parametrize("value", ["0.5", True, [1.0]])
def test_what_is_not_a_number_is_refused(tmp_path, value):
    with plain_writer(tmp_path) as writer, pytest.raises(ValueError, match="reward/mean of step 1"):
        writer.write(1, {"reward/mean": value})
    assert read_metrics(tmp_path) == []


def test_steps_must_grow(tmp_path):
    with plain_writer(tmp_path) as writer:
        writer.write(2, {})
        for step in (2, 1):
            with pytest.raises(ValueError, match="steps must grow"):
                writer.write(step, {})
        writer.write(5, {})
    assert [line["step"] for line in read_metrics(tmp_path)] == [2, 5]


def test_unknown_name_is_written_and_reported_once(tmp_path, caplog):
    with plain_writer(tmp_path) as writer:
        writer.write(1, {"surprise/value": 1.0})
        writer.write(2, {"surprise/value": 2.0})
    assert [line["surprise/value"] for line in read_metrics(tmp_path)] == [1.0, 2.0]
    assert caplog.text.count("surprise/value") == 1


def write_steps(path, steps):
    with plain_writer(path) as writer:
        for step in steps:
            writer.write(step, {"reward/mean": step / 3})
    return (Path(path) / "metrics.jsonl").read_bytes()


def test_resume_cuts_and_goes_on(tmp_path):
    whole = write_steps(tmp_path, range(8))
    with plain_writer(tmp_path, resume_step=4) as writer:
        assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]
        assert writer.last == {"step": 4, "reward/mean": 4 / 3}
        for step in range(5, 8):
            writer.write(step, {"reward/mean": step / 3})
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_starting_afresh_sets_earlier_lines_aside(tmp_path):
    first = write_steps(tmp_path, range(3))
    second = write_steps(tmp_path, range(2))
    plain_writer(tmp_path).close()
    plain_writer(tmp_path).close()  # of no line nothing is kept
    assert read_metrics(tmp_path) == []
    assert [(tmp_path / f"metrics.jsonl.{n}").read_bytes() for n in (1, 2)] == [first, second]
    assert not (tmp_path / "metrics.jsonl.3").exists()


@settings(deadline=None, max_examples=50)
@given(st.integers(min_value=0), st.integers(min_value=-1, max_value=7))
def test_a_file_torn_at_any_byte_resumes(position, step):
    """Whatever prefix of the file survives, the lines up to `step` that are whole in it survive, bitwise."""
    with tempfile.TemporaryDirectory() as directory:
        whole = write_steps(directory, range(6))
        torn = whole[: position % (len(whole) + 1)]
        path = Path(directory) / "metrics.jsonl"
        path.write_bytes(torn)
        plain_writer(directory, resume_step=step).close()
        expected = [line for i, line in enumerate(whole.splitlines(True)) if i <= step and torn.startswith(
            b"".join(whole.splitlines(True)[: i + 1]).rstrip(b"\n"))]  # fmt: skip
        assert path.read_bytes() == b"".join(expected)


def test_damage_before_the_last_line_is_an_error(tmp_path):
    whole = write_steps(tmp_path, range(3)).splitlines(True)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(whole[0] + b"\0\0\0\n" + whole[2])
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a JSON object"):
        plain_writer(tmp_path, resume_step=1)
    assert path.read_bytes() == whole[0] + b"\0\0\0\n" + whole[2], "nothing is written over"
    with pytest.raises(DataError, match="no such file"):
        read_metrics(tmp_path / "nowhere")
    path.write_bytes(whole[0] + b'{"reward/mean": 1.0}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: 'step' is None"):
        read_metrics(tmp_path)


def test_lines_survive_kill_9(tmp_path):
    """A process killed at any moment leaves whole lines (and at most one torn one) in their order."""
    script = (
        "import sys; from r1mega.files import JsonLinesWriter\n"
        "w = JsonLinesWriter(sys.argv[1])\n"
        "for step in range(10**9): w.write({'step': step, 'text': 'x' * 200})\n"
    )
    path = tmp_path / "lines.jsonl"
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], cwd=Path(__file__).parents[3])
    try:
        deadline = time.monotonic() + 60
        while (not path.exists() or path.stat().st_size < 20_000) and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    records = read_json_lines(path)
    assert len(records) > 50 and [r["step"] for r in records] == list(range(len(records)))
    writer = JsonLinesWriter(path, resume_step=40)
    writer.write({"step": 41})
    writer.close()
    assert [r["step"] for r in read_json_lines(path)] == list(range(42))


def test_write_atomic_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError):
        write_atomic(path, "new")  # a file cannot replace a directory
    assert [p.name for p in tmp_path.iterdir()] == ["file"], "no temporary file stays"


def test_disabled_writer_touches_nothing(tmp_path):
    writer = MetricsWriter(tmp_path / "run", enabled=False, wandb_project="unused")
    assert writer.write(1, {"reward/mean": 1.0}) == {"step": 1, "reward/mean": 1.0}
    writer.close()
    assert not (tmp_path / "run").exists()


def test_tensorboard_purges_on_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 6):
            writer.write(step, {"reward/mean": float(step), "policy/kl": math.nan})
    with MetricsWriter(tmp_path, resume_step=3) as writer:
        for step in range(4, 6):
            writer.write(step, {"reward/mean": 10.0 * step})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["reward/mean"]
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50)]


def test_runs_of_one_name_are_two_runs_of_wandb(tmp_path, monkeypatch):
    begun = []
    fake = SimpleNamespace(init=lambda **given: begun.append(given) or SimpleNamespace(finish=lambda: None))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for place, resume in (("a", None), ("b", None), ("a", 3), ("a", None), ("c", 2), ("c", 4)):
        run_dir = tmp_path / place / "zero"
        run_dir.mkdir(parents=True, exist_ok=True)
        MetricsWriter(run_dir, resume_step=resume, tensorboard=False, wandb_project="project").close()
    ids = [given["id"] for given in begun]
    assert ids[4:] == ["zero", "zero"], "of a run that an earlier version began"
    ids = ids[:4]
    assert ids[2] == ids[0] and len(set(ids)) == 3, "its own, kept on resume, another for a run that begins anew"
    assert all(name.startswith("zero-") for name in ids) and {given["name"] for given in begun} == {"zero"}


def test_wandb_missing_is_a_platform_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(PlatformError, match="pip install wandb"):
        MetricsWriter(tmp_path, tensorboard=False, wandb_project="project")


def test_every_promised_name_is_in_the_table_itself():
    exact = {metric.name for metric in registry.METRICS}
    assert set(ISSUE_NAMES) <= exact
    assert len(exact) == len(registry.METRICS), "no name twice"


def test_find_metric_prefers_the_exact_name():
    assert registry.find_metric("reward/mean").name == "reward/mean"
    assert registry.find_metric("reward/language").name == "reward/*"
    assert registry.find_metric("time/save_seconds").name == "time/*_seconds"
    assert registry.find_metric("reward/") is None and registry.find_metric("xreward/mean") is None


def test_docs_table_is_the_registry():
    path = Path(__file__).parents[3] / "docs" / "metrics.md"
    assert path.read_text() == registry.metrics_markdown(), "run python -m r1mega.observe.registry > docs/metrics.md"


def test_what_a_model_does_not_have_is_null_without_a_warning(tmp_path, caplog):
    with plain_writer(tmp_path) as writer:
        writer.write(1, {"expert/load_max_over_mean": None})
    assert read_metrics(tmp_path) == [{"step": 1, "expert/load_max_over_mean": None}] and not caplog.text
