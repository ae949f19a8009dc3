"""docs/extending.md does what it says: its files, as they stand there, in a folder of a user."""

from __future__ import annotations

import json
import os
import re

import pytest
import yaml

from tests import processes
from tests.e2e.runs import metrics, zero_arguments
from tests.processes import REPOSITORY, environment

BLOCK = re.compile(r"^```(?:python|yaml)\n# (\S+)\n(.*?)^```$", re.M | re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with every file of the document."""
    directory = tmp_path_factory.mktemp("mine")
    files = dict(BLOCK.findall((REPOSITORY / "docs/extending.md").read_text()))
    assert set(files) == {"my_rewards.py", "brief.yaml", "my_stage.py", "lengths.yaml"}
    for name, text in files.items():
        (directory / name).write_text(text.replace("configs/nano", f"{REPOSITORY}/configs/nano"))
    return directory


def run(folder, *arguments):
    path = os.pathsep.join([str(folder), environment().get("PYTHONPATH", "")])
    return processes.run(*arguments, variables=environment() | {"PYTHONPATH": path})


def test_a_reward_of_ones_own(folder, nano_base, tmp_path):
    arguments = [item for item in zero_arguments(nano_base, tmp_path / "run") if "zero.yaml" not in str(item)]
    done = run(folder, "train", folder / "brief.yaml", *arguments[1:], "steps=1")
    assert done.returncode == 0, done.stdout[-4000:]
    (line,) = metrics(tmp_path / "run")
    assert 0 < line["reward/brevity"] <= 1
    parts = line["reward/accuracy"] + 0.1 * line["reward/format"] + 0.2 * line["reward/brevity"]
    assert line["reward/mean"] == pytest.approx(parts, abs=1e-6)


def test_a_part_that_is_not_there_is_told_before_anything_starts(folder, nano_base, tmp_path):
    arguments = [item for item in zero_arguments(nano_base, tmp_path / "run") if "zero.yaml" not in str(item)]
    done = run(folder, "train", folder / "brief.yaml", *arguments[1:], "reward.custom.brevity.part=my_reward:Brevity")
    assert done.returncode == 2 and "No module named 'my_reward'" in done.stdout
    assert not (tmp_path / "run").exists()


def test_a_stage_of_ones_own(folder, nano_base, tmp_path):
    arguments = [
        "train", folder / "lengths.yaml", f"run_dir={tmp_path}/run", f"model.path={nano_base}/hf",
        f"data.prompts=[{nano_base}/data/train.jsonl]",
    ]  # fmt: skip
    done = run(folder, *arguments)
    assert done.returncode == 0, done.stdout[-4000:]
    lengths = json.loads((tmp_path / "run/lengths.json").read_text())
    lines = (nano_base / "data/train.jsonl").read_text().splitlines()
    assert len(lengths) == len(lines) and all(length > 1 for length in lengths.values())
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["stage"] == "my_stage:PromptLengths"
    again = run(folder, *arguments)
    assert again.returncode == 0 and "finished before; nothing to do" in again.stdout
