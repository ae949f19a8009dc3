"""The stage from its config to the comparison of two checkpoints, with a kill in the middle.

The checkpoint (conftest) always answers 3, so what it must score is known from the files.
"""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml

from r1mega.cli import app
from r1mega.config.load import load_config
from r1mega.config.validate import validate
from r1mega.doctor.config import config_facts
from r1mega.errors import ConfigError
from r1mega.evaluate.compare import comparison_table, read_results
from r1mega.evaluate.result import read_result
from r1mega.stages import is_finished
from tests import processes

pytestmark = pytest.mark.heavy

SAMPLES = Path("tests/data/evaluate")
GSM8K = str(SAMPLES / "gsm8k.jsonl")
NUM_SAMPLES = 6


@pytest.fixture
def config(run_dir, data, tmp_path):
    """A function that writes a config of two tasks and says where."""

    def write(name="config.yaml", **changes):
        content = {
            "stage": "evaluate",
            "run_dir": str(tmp_path / "evaluation"),
            "threads": 1,
            "observe": {"tensorboard": False},
            "model": {"path": str(run_dir / "hf"), "dtype": "float32"},
            "rollout": {"engine": "transformers"},
            "tasks": {
                "prompts": {"data": str(data), "num_samples": NUM_SAMPLES, "temperature": 3.0, "top_p": 1.0,
                            "max_tokens": 16},
                "pens": {"form": "gsm8k", "data": str(SAMPLES / "gsm8k.jsonl"), "num_samples": 2, "temperature": 0.2,
                         "wording": "{{ question[:30] }}"},
            },
        }  # fmt: skip
        path = tmp_path / name
        path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
        return path

    return write


def run(path, *overrides, **options):
    done = processes.run("train", path, *overrides, **options)
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def interrupt(path, samples, at, sent):
    """Send the signal once `samples` holds `at` lines; the exit code."""
    with open(path.with_suffix(".log"), "w") as log:
        process = processes.start("train", path, output=log)
    limit = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < limit:
        if samples.exists() and samples.read_bytes().count(b"\n") >= at:
            process.send_signal(sent)
            break
        time.sleep(0.002)
    assert process.wait(200) in (-signal.SIGKILL, 85), path.with_suffix(".log").read_text()[-6000:]
    return process.returncode


def rows(directory, task):
    """What does not depend on time."""
    (checkpoint,) = [path.parent.parent for path in directory.glob(f"*/{task}/result.json")]
    return read_result(checkpoint / task / "result.json").rows


def figures(directory):
    (checkpoint,) = json.loads((directory / "results.json").read_text())["checkpoints"]
    return {name: entry["metrics"] for name, entry in checkpoint["tasks"].items()}


def test_kill_and_stop_in_the_middle_lose_and_change_nothing(config, run_dir, tmp_path):
    """kill -9, then SIGTERM, then to the end; against an uninterrupted run, with another number of ranks."""
    path = config()
    directory = tmp_path / "evaluation"
    samples = directory / run_dir.name / "prompts" / "samples-00000.jsonl"
    assert interrupt(path, samples, 20, signal.SIGKILL) == -signal.SIGKILL
    killed = samples.read_bytes()
    whole_lines = killed[: killed.rfind(b"\n") + 1]
    assert 20 <= whole_lines.count(b"\n") < 24 * NUM_SAMPLES and not (directory / "results.json").exists()
    assert interrupt(path, samples, whole_lines.count(b"\n") + 20, signal.SIGTERM) == 85
    assert json.loads((directory / "status.json").read_text())["state"] == "interrupted"
    stopped = samples.read_bytes()
    assert stopped.startswith(whole_lines) and stopped.count(b"\n") < 24 * NUM_SAMPLES
    run(path)
    assert samples.read_bytes().startswith(stopped), "samples were drawn again"
    keys = [(line["prompt_id"], line["index"]) for line in map(json.loads, samples.read_text().splitlines())]
    assert len(keys) == len(set(keys)) == 24 * NUM_SAMPLES
    assert json.loads((directory / "status.json").read_text())["state"] == "finished"

    run(config("two.yaml", run_dir=str(tmp_path / "two")), num_ranks=2)
    assert len(list((tmp_path / "two" / run_dir.name / "prompts").glob("samples-*.jsonl"))) == 2
    for task in ("prompts", "pens"):
        assert rows(directory, task) == rows(tmp_path / "two", task), "a kill or another division changes samples"
    assert len({text for row in rows(directory, "prompts") for text in row.texts}) > 24, "the samples do not differ"
    metrics = [figures(directory), figures(tmp_path / "two")]
    assert metrics[0] == metrics[1] and metrics[0]["pens"]["eval/accuracy"] == 0.5
    assert "nothing to do" in run(path)
    stage, (weights,), results = load_config(path), (run_dir / "hf").glob("*.safetensors"), directory / "results.json"
    before, stored = weights.stat(), json.loads(results.read_text())
    os.utime(weights)
    assert not is_finished(stage), "written anew: the next start says so"
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert is_finished(stage)
    stored["checkpoints"][0]["tasks"]["pens"]["num_failed"] = 1
    results.write_text(json.dumps(stored))
    assert not is_finished(stage), "the next start grades it again"

    before, drawn = rows(directory, "prompts"), samples.read_bytes()
    for file in [*directory.rglob("grades-*.jsonl"), directory / "results.json"]:
        file.unlink()
    run(path)  # graded anew, from the texts
    assert rows(directory, "prompts") == before and samples.read_bytes() == drawn


def test_more_is_added_and_nothing_drawn_twice(config, run_dir, data, tmp_path, capsys):
    """By vLLM: a finished run gets another task, more samples and another checkpoint; then the two are compared."""
    golds = [json.loads(line)["answer"] for line in data.read_text().splitlines()]
    tasks = {"prompts": {"data": str(data), "num_samples": 2, "temperature": 0.2}}
    vllm = {"engine": "vllm", "kv_cache_bytes": 1 << 26}
    run(config(tasks=tasks, rollout=vllm))
    directory = tmp_path / "evaluation"
    samples = directory / run_dir.name / "prompts" / "samples-00000.jsonl"
    first = samples.read_bytes()
    other = tmp_path / "copy"
    shutil.copytree(run_dir, other, copy_function=os.link)
    tasks["prompts"]["num_samples"] = 3
    tasks["pens"] = {"form": "gsm8k", "data": str(SAMPLES / "gsm8k.jsonl"), "num_samples": 1, "temperature": 0.2,
                     "wording": "{{ question[:30] }}"}  # fmt: skip
    output = run(config(tasks=tasks, rollout=vllm, others=[str(other)]))
    assert samples.read_bytes().startswith(first) and samples.read_bytes().count(b"\n") == 24 * 3
    expected = sum(gold == "3" for gold in golds) / 24
    stored = json.loads((directory / "results.json").read_text())
    assert [entry["name"] for entry in stored["checkpoints"]] == [run_dir.name, "copy"]
    for entry in stored["checkpoints"]:
        assert entry["tasks"]["prompts"]["metrics"]["eval/accuracy"] == pytest.approx(expected)
        assert entry["tasks"]["pens"]["metrics"]["eval/accuracy"] == 0.5
    table = (directory / "results.md").read_text()
    assert f"| prompts | copy | 24 x 3 | {expected:.3f} |" in table and "evaluation" in output
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["eval/pens/accuracy"] for line in lines] == [0.5, 0.5]

    results = [read_results(directory, name) for name in (run_dir.name, "copy")]
    assert [(row[0], row[4], row[6]) for row in comparison_table(*results).rows] == [
        ("prompts", "+0.0000", "1.0000"), ("pens", "+0.0000", "1.0000")
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="several checkpoints: say which"):
        read_results(directory / "results.json")
    with pytest.raises(ConfigError, match="no checkpoint 'nobody'"):
        read_results(directory, "nobody")
    names = ["--first", "copy", "--second", run_dir.name, "--markdown"]
    app(["compare", str(directory), str(directory / "results.json"), *names], standalone_mode=False)
    assert "| pens | 2 | 0.5000 | 0.5000 | +0.0000 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {"nonsense": {"data": GSM8K}}}, r"tasks\.nonsense: no task is called so"),
        ({"tasks": {"gsm8k": {"data": "gone.jsonl"}}}, r"tasks\.gsm8k\.data: gone\.jsonl is missing"),
        ({"tasks": {"gsm8k": None}}, r"tasks: none is named"),
        ({"tasks": {"gsm8k": {"data": GSM8K, "max_tokens": 500}}}, r"max_tokens = 500 leaves no room"),
        ({"others": ["nowhere"]}, r"others: nowhere is no directory"),
        ({"rollout": {"tp": 2}}, r"rollout\.tp = 2 does not divide the 1 processes"),
    ],
)
def test_problems_are_found_before_anything_starts(config, changes, message):
    with pytest.raises(ConfigError, match=message):
        validate(load_config(config(**changes)), 1)


def test_doctor_knows_the_stage(config):
    _, facts, problem = config_facts(config(), [])
    assert problem is None and any("transformers" in str(fact) for fact in facts)


@pytest.mark.slow
def test_an_engine_a_process_says_the_same_as_two_in_one(config, run_dir, tmp_path):
    """Two checkpoints with vLLM: one after the other in one process, and by two ranks that can build one engine each and
    start themselves anew for the next."""
    other = tmp_path / "other"
    shutil.copytree(run_dir, other)
    pens = {"form": "gsm8k", "data": GSM8K, "num_samples": 2, "temperature": 0.5, "wording": "{{ question[:30] }}"}
    path = config(
        others=[str(other)], rollout={"engine": "vllm", "kv_cache_bytes": 32 << 20}, tasks={"pens": pens}
    )  # fmt: skip
    anew = "starting anew"
    assert anew not in run(path)
    worker = ["tests/unit/evaluate/one_engine_worker.py"]
    output = run(path, f"run_dir={tmp_path}/one", num_ranks=2, program=worker)
    assert output.count(anew) == 1, output
    results = [
        json.loads((tmp_path / name / "results.json").read_text())["checkpoints"] for name in ("evaluation", "one")
    ]
    assert len(results[0]) == 2 and results[0] == results[1]
    for name in (checkpoint["name"] for checkpoint in results[0]):
        ours, theirs = (read_result(tmp_path / run / name / "pens/result.json").rows for run in ("evaluation", "one"))
        assert ours == theirs
    assert json.loads((tmp_path / "one/status.json").read_text())["state"] == "finished"
