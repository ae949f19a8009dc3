"""What a pipeline would do with nodes whose run directories are as two stages would have left them."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from r1mega.cli import app
from r1mega.config.pipeline import load_pipeline
from r1mega.errors import ConfigError
from r1mega.observe.lineage import Attempt, Lineage, stamp_outputs, write_lineage
from r1mega.observe.progress import QUIET
from r1mega.stages.pipeline import _wait, covered, decide, dry_run, jobs, run_pipeline

FILE = f"""
name: two
dir: runs/nano
nodes:
  base: {{config: {Path.cwd()}/configs/nano/base.yaml}}
  zero: {{config: {Path.cwd()}/configs/nano/zero.yaml, ranks: 2}}
"""


@pytest.fixture
def load(tmp_path):
    """A function: the pipeline with overrides, in a directory where both nodes are finished."""
    file = tmp_path / "two.yaml"
    file.write_text(FILE)

    def loaded(*overrides):
        return load_pipeline(file, [f"dir={tmp_path}/runs", *overrides])

    pipeline = loaded()
    for node in pipeline.nodes.values():
        _finish(node, pipeline)
    return loaded


def _finish(node, pipeline):
    """The files that matter of a stage that ended well, and its record."""
    run_dir = node.config.run_dir
    decision = decide(node, pipeline, redo=False)
    assert decision.action == "run"
    (run_dir / "hf").mkdir(parents=True)
    config = json.loads(Path("configs/nano/model/config.json").read_text())
    (run_dir / "hf" / "config.json").write_text(json.dumps(config))
    (run_dir / "hf" / "model.safetensors").write_text(node.name)
    (run_dir / "hf" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    (run_dir / "data").mkdir()
    for name in ("train", "eval"):
        (run_dir / "data" / f"{name}.jsonl").write_text(json.dumps({"question": name, "answer": "1"}) + "\n")
    (run_dir / "config.yaml").write_text("stage: x\n")
    (run_dir / "status.json").write_text(json.dumps({"state": "finished", "step": node.config.steps}))
    write_lineage(run_dir, Lineage(
        node.name, node.config.stage, "finished", decision.fingerprint, covered(node.config), dict(decision.inputs),
        stamp_outputs(run_dir), (Attempt("2026-01-01T00:00:00+00:00", None, "2026-01-01T00:00:01+00:00", 0),),
    ))  # fmt: skip


def actions(pipeline, *names, **options):
    return [d.action for d in dry_run(pipeline, names or ("base", "zero"), **options).values()]


def test_nothing_to_do_wherever_it_lies(load, tmp_path):
    assert actions(load()) == ["skip", "skip"] == actions(load("zero.observe.tensorboard=false", "base.threads=2"))
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert actions(load(f"dir={tmp_path}/moved")) == ["skip", "skip"]


def test_a_change_is_refused_and_goes_down_with_redo(load):
    changed = load("base.steps=7")
    assert actions(changed) == ["refuse", "run"] and actions(changed, redo=True) == ["redo", "redo"]
    assert actions(load("zero.steps=7")) == ["skip", "refuse"] and actions(load("zero.steps=7"), redo=True) == [
        "skip",
        "redo",
    ]


@pytest.mark.parametrize("file", ["hf/model.safetensors", "hf/config.json", "hf/tokenizer.json", "data/train.jsonl"])
@pytest.mark.parametrize("damage", [lambda f: f.write_text("x"), lambda f: f.unlink()], ids=["written", "gone"])
def test_an_input_that_is_not_what_its_node_made_is_noticed_by_its_reader_alone(load, file, damage):
    base = load().nodes["base"].config.run_dir
    damage(base / file)
    found = dry_run(load(), ["zero"])["zero"]
    assert found.action == "wait" and f"{file} is not what base made" in found.reason
    assert actions(load()) == ["refuse", "run"] and actions(load(), redo=True) == ["redo", "run"]


def test_a_record_of_an_older_program_lacks_keys_and_has_others(load):
    run_dir = load().nodes["zero"].config.run_dir
    record = json.loads((run_dir / "lineage.json").read_text())
    for name in ("fp8", "recompute"):
        del record["config"]["model"][name]
    for name in ("clip_high", "dynamic_sampling"):
        del record["config"]["algorithm"][name]
    (run_dir / "lineage.json").write_text(json.dumps(record))
    assert actions(load()) == ["skip", "skip"]
    changed = load("zero.algorithm.clip_high=0.3")
    assert actions(changed) == ["skip", "refuse"]
    assert "algorithm.clip_high: 0.2 -> 0.3" in dry_run(changed, ["zero"])["zero"].reason
    record["config"]["algorithm"]["clip_hihg"] = 0.3
    (run_dir / "lineage.json").write_text(json.dumps(record))
    reason = dry_run(load(), ["zero"])["zero"].reason
    assert f"{run_dir}/lineage.json: unknown key algorithm.clip_hihg; did you mean algorithm.clip_high?" in reason


def test_what_a_reader_does_not_read_is_no_concern_of_its(load):
    (load().nodes["base"].config.run_dir / "data" / "other.jsonl").write_text("")
    (load().nodes["base"].config.run_dir / "hf.old").mkdir()
    assert actions(load(), "zero") == ["skip"]


def test_jobs_are_those_that_can_run(load, tmp_path):
    def listed(pipeline, **options):
        return list(jobs(pipeline, dry_run(pipeline, ["base", "zero"], **options)))

    assert listed(load()) == []
    with pytest.raises(ConfigError, match=r"node zero: .*was made of something else"):
        listed(load("zero.steps=7"))
    assert listed(load("zero.steps=7"), redo=True) == ["zero\t1\t2\t-"]
    assert listed(load("base.steps=7", "ranks_per_machine=1"), redo=True) == ["base\t1\t1\t-", "zero\t2\t1\tbase"]
    (tmp_path / "runs" / "hashes.json").unlink()
    listed(load())
    assert not (tmp_path / "runs" / "hashes.json").exists(), "a dry run writes nothing"
    listed(load(), remember=True)
    assert "configs/nano/model/config.json" in (tmp_path / "runs" / "hashes.json").read_text()


def interrupted(stage: str, ready: Path) -> None:
    """Start it, and interrupt this process alone once the file is there."""

    def interrupt() -> None:
        while not ready.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            _wait([sys.executable, "-c", stage], threading.Event())
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_waits_for_what_the_stage_saves(tmp_path, monkeypatch):
    monkeypatch.setattr("r1mega.stages.pipeline._terminal_told_all", lambda: True)
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    interrupted(f"import time; open({str(ready)!r}, 'w'); time.sleep(2); open({str(saved)!r}, 'w')", ready)
    assert saved.exists()


def test_an_interrupt_that_came_to_the_pipeline_alone_asks_the_stage_to_save(tmp_path, monkeypatch):
    monkeypatch.setattr("r1mega.stages.pipeline._terminal_told_all", lambda: False)
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    save = f"lambda *_: (open({str(saved)!r}, 'w'), sys.exit())"
    stage = (
        f"import signal, sys, time; signal.signal(signal.SIGTERM, {save}); open({str(ready)!r}, 'w'); time.sleep(60)"
    )
    interrupted(stage, ready)
    assert saved.exists()


def test_a_dry_run_refuses_a_generator_that_its_gpus_cannot_hold():
    """1.3 TB of DeepSeek-V3 on one GPU: known from config.json alone, before anything is downloaded."""
    file = Path(__file__).parents[3] / "configs/deepseek_v3_671b/r1.yaml"
    with pytest.raises(ConfigError, match=r"zero .*rollout.tp = 1: .* 1,342.1 GB a GPU.* at least 32"):
        dry_run(load_pipeline(file, ["zero.rollout.tp=1"]), ["zero"])
    # the student that an earlier node makes, not the model beside the file
    assert list(dry_run(load_pipeline(file), ["evaluate_student"])) == ["evaluate_student"]


def test_quiet_tells_what_failed_and_what_was_moved(load, monkeypatch, capfd):
    monkeypatch.setenv(QUIET, "1")
    pipeline = load("zero.optimizer.lr=0.5")
    assert run_pipeline(pipeline, ["base", "zero"], redo=True, launcher="false") == 1
    (old,) = pipeline.dir.glob("zero.before-*")
    assert capfd.readouterr().out.splitlines() == [
        f"[two] zero: the old run is kept as {old}", "[two] zero: failed with exit code 1"
    ]  # fmt: skip


@pytest.mark.parametrize(("names", "code"), [(["base", "zero"], 85), (["base"], 0)])
def test_asked_to_stop_while_a_stage_ends_no_other_is_begun(load, tmp_path, capfd, names, code):
    stage = tmp_path / "stage.py"
    stage.write_text(
        "import os, signal, sys\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nos.kill(os.getppid(), signal.SIGTERM)\n"
        f"open({str(tmp_path / 'begun')!r}, 'a').write(sys.argv[-1])\n"
    )
    pipeline = load("base.steps=7")
    assert run_pipeline(pipeline, names, redo=True, launcher=f"{sys.executable} {stage}") == code
    assert (tmp_path / "begun").read_text() == str(pipeline.dir / "nodes/base.yaml")
    assert ("base: finished, and asked to stop; start again" in capfd.readouterr().out) == (code == 85)


def quickstart(*arguments):
    return CliRunner().invoke(app, ["quickstart", "--dry-run", *arguments])


def test_quickstart_takes_any_directory_and_can_redo(load, tmp_path):
    """What two stages left there was made of something else: refused without --redo."""
    runs = tmp_path / "träume 🍀"
    load().dir.rename(runs)
    refused, again = (
        quickstart("--dir", str(runs), "--stage", "zero", "--seed", "7", *more) for more in ([], ["--redo"])
    )
    assert f"records in {runs}" in refused.output and "refuse  base" in refused.output, refused.output
    assert "redo  base" in again.output, again.output


def test_quickstart_names_its_own_option():
    with pytest.raises(ConfigError, match=r"^--stage nosuch: no such node"):
        raise quickstart("--stage", "nosuch").exception
