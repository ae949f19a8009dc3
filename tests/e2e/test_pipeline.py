"""A pipeline of two small real stages: interrupted, gone on with, skipped, refused, redone, reported."""

import json
import re

import pytest

from r1mega.config.pipeline import load_pipeline
from r1mega.errors import ConfigError
from r1mega.stages.pipeline import dry_run, jobs, select
from tests.e2e.runs import SMALL, lineage, metrics, r1mega
from tests.e2e.test_report import dump_dom, line_points, needs_browser, plots


def decisions(arguments):
    pipeline = load_pipeline(arguments[1], arguments[2:])
    return dry_run(pipeline, select(pipeline, None, None, None))


@pytest.fixture(scope="module")
def whole(small_pipeline):
    return small_pipeline


def test_an_interrupted_stage_goes_on_and_a_finished_one_is_skipped(whole):
    directory, _, first, output = whole
    assert first == ("running", 85, "interrupted")
    assert "base: skip" in output and "zero: resume (interrupted)" in output and "resuming" in output
    assert [line["step"] for line in metrics(directory / "zero")] == [1, 2, 3]
    record = lineage(directory, "zero")
    assert record["state"] == "finished" and [a["exit_code"] for a in record["attempts"]] == [85, 0]
    assert len(lineage(directory, "base")["attempts"]) == 1


def test_lineage_ties_outputs_to_inputs(whole):
    directory, *_ = whole
    base, zero = lineage(directory, "base"), lineage(directory, "zero")
    prompts = zero["inputs"]["data.prompts.0"]
    assert prompts["sha256"] == base["outputs"]["data/train.jsonl"]["sha256"] and prompts["owner"] == "base"
    assert zero["inputs"]["model.path"]["owner"] == "base" and "hf/model.safetensors" in zero["outputs"]
    assert zero["environment"]["packages"]["torch"] and "evaluate.data" not in zero["inputs"]
    assert re.fullmatch("[0-9a-f]{64}", zero["fingerprint"])


def test_everything_is_skipped_when_nothing_changed(whole):
    directory, arguments, *_ = whole
    before = {node: (directory / node / "lineage.json").read_bytes() for node in ("base", "zero")}
    output = r1mega(*arguments).stdout
    assert "base: skip" in output and "zero: skip" in output
    assert {node: (directory / node / "lineage.json").read_bytes() for node in before} == before


@pytest.mark.parametrize(
    ("changes", "actions", "reason"),
    [
        (
            ["zero.threads=2", "zero.observe.tensorboard=true", "zero.evaluate.num_prompts=2"],
            ["skip", "skip"],
            "finished",
        ),
        (["zero.optimizer.lr=0.5"], ["skip", "refuse"], r"optimizer.lr: 0.0008 -> 0.5"),
        (["base.steps=61"], ["refuse", "run"], "after base; skipped only if they make the same again"),
        (["zero.steps=5"], ["skip", "refuse"], "steps: 3 -> 5"),
    ],
)
def test_what_a_change_means(whole, changes, actions, reason):
    found = decisions([*whole[1], *changes])
    assert [decision.action for decision in found.values()] == actions
    assert re.search(reason, found["zero"].reason), found["zero"].reason


def test_a_changed_output_is_noticed(whole):
    directory, arguments, *_ = whole
    prompts = directory / "base" / "data" / "train.jsonl"
    text = prompts.read_text()
    prompts.write_text(text.replace("a", "b", 1))
    try:
        found = decisions(arguments)
        assert found["base"].action == "refuse" and "output data/train.jsonl is not what it was" in found["base"].reason
        pipeline = load_pipeline(arguments[1], arguments[2:])
        zero = dry_run(pipeline, ["zero"])["zero"]
        assert zero.action == "wait" and "data/train.jsonl is not what base made" in zero.reason, (
            "whoever reads it notices"
        )
    finally:
        prompts.write_text(text)
    assert decisions(arguments)["base"].action == "skip"


def test_a_list_of_jobs_holds_what_could_run_only(whole):
    pipeline = load_pipeline(whole[1][1], [*whole[1][2:], "zero.optimizer.lr=0.5"])
    with pytest.raises(ConfigError, match=r"node zero: .*made of something else"):
        list(jobs(pipeline, dry_run(pipeline, ["base", "zero"])))
    assert [line.split("\t")[0] for line in jobs(pipeline, dry_run(pipeline, ["base", "zero"], redo=True))] == ["zero"]


def test_what_redo_would_do(whole):
    pipeline = load_pipeline(whole[1][1], [*whole[1][2:], "base.steps=61"])
    found = dry_run(pipeline, ["base", "zero"], redo=True)
    assert [decision.action for decision in found.values()] == ["redo", "redo"]


def test_a_changed_node_is_refused_then_redone_with_the_old_run_kept(whole, tmp_path):
    directory, arguments, *_ = whole
    changed = [*arguments, "zero.steps=1"]
    refused = r1mega(*changed, check=False)
    assert refused.returncode == 2 and "steps: 3 -> 1" in refused.stdout and "--redo" in refused.stdout
    output = r1mega(*changed, "--redo", "--only", "zero").stdout
    (kept,) = directory.glob("zero.before-*")
    assert str(kept) in output and [line["step"] for line in metrics(kept)] == [1, 2, 3]
    assert [line["step"] for line in metrics(directory / "zero")] == [1]
    (directory / "zero").rename(tmp_path / "zero")
    kept.rename(directory / "zero")
    assert decisions(arguments)["zero"].action == "skip"


def test_selection_and_dry_run_write_nothing(whole, tmp_path):
    _, arguments, *_ = whole
    moved = [*arguments[:2], f"dir={tmp_path}/runs", *SMALL]
    output = r1mega(*moved, "--dry-run").stdout
    assert "run  base" in output and "run  zero" in output and "after base" in output
    assert not (tmp_path / "runs").exists()
    assert f"zero: needs {tmp_path}/runs/base/hf" in r1mega(*moved, "--only", "zero", check=False).stdout
    assert not (tmp_path / "runs" / "zero").exists()
    assert r1mega(*moved, "--until", "none", check=False).returncode == 2
    assert r1mega(*moved, "--jobs").stdout.split("\n")[:2] == ["base\t1\t1\t-", "zero\t1\t1\tbase"]
    assert "configs/nano/model/config.json" in (tmp_path / "runs" / "hashes.json").read_text(), "read once"


@needs_browser
def test_report_in_a_browser(whole, tmp_path):
    directory, *_ = whole
    page = r1mega("report", directory).stdout.strip()
    assert page == str(directory / "report.html")
    dom = dump_dom(directory / "report.html", tmp_path / "profile")
    drawn = plots(dom)
    assert list(drawn) == [
        "ladder", "time", "base-loss", "zero-response-length", "zero-accuracy", "zero-language-mixing", "zero-reward-parts",
    ]  # fmt: skip
    assert all('class="main-svg"' in plot for plot in drawn.values())
    assert drawn["ladder"].count('class="point"') == 2
    assert len(line_points(drawn["zero-response-length"])[0]) == 3
    assert dom.count('<g class="finished"') == 2 and "<title>base → zero</title>" in dom
    ends = [json.loads(line) for line in (directory / "zero" / "evaluations.jsonl").read_text().splitlines()]
    rows = re.findall(r"<tr><th>(\w+)</th><td[^>]*>([\d.]+)</td>", dom.split('id="ladder"')[-1])
    assert rows[:2] == [(name, f"{end['eval/accuracy']:.3f}") for name, end in zip(("base", "zero"), ends, strict=True)]
    assert lineage(directory, "zero")["fingerprint"] in dom
