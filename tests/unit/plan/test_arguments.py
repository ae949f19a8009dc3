"""Arguments of `r1mega plan` that make no plan: each is refused before anything is built, with what to give instead."""

from __future__ import annotations

from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from typer.testing import CliRunner

from r1mega.arguments import expanded_path
from r1mega.cli import app
from r1mega.errors import ConfigError

REPOSITORY = Path(__file__).parents[3]
ZERO = str(REPOSITORY / "configs/deepseek_v3_671b/zero.yaml")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--mean", "inf"), "--mean inf: wants a number"),
        (("--mean", "40000"), "allows 32,768 tokens at most"),
        (("--imbalance", "inf"), "--imbalance inf: wants a number"),
        (("--gpu", "h100"), "--gpu h100: not one of h100-80, h200"),
        (("--gpus", "12"), "--gpus 12 --search` proposes layouts"),
        (("--gpus", "256", "parallel.etp=8"), "zero_256.yaml is made for 256 GPUs"),
        (("--gpus", "12"), "rollout.tp = 32 does not divide the 12 processes; 4 would"),
        (("--host-memory", "inf"), "--host-memory inf: wants a number"),
        (("--host-memory", "30"), "--host-memory 30: the programs of a node's 8 ranks alone are counted with 40 GB"),
        (("--gpus", "100000"), "100000"),
        (("--sbatch", "missing/job.sh"), "--sbatch missing/job.sh: wants the name of a file"),
        (("--sbatch", "."), "--sbatch .: wants the name of a file"),
        (("--lengths", "missing"), "--lengths missing: wants one number of tokens a line"),
        (("--calibrate", "missing"), "--calibrate missing: not the directory of a run"),
    ],
)
def test_what_is_refused(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(app, ["plan", ZERO, *(() if "--gpus" in words else ("--gpus", "512")), *words])
    assert isinstance(found.exception, ConfigError), found.output
    assert said in str(found.exception)


def test_every_path_of_every_command_takes_a_home_directory():
    """No shell replaces `~` in --option=~/x."""
    apps = [app, *(group.typer_instance for group in app.registered_groups)]
    commands = [command.callback for one in apps for command in one.registered_commands]
    paths = [
        (function.__name__, name, hint)
        for function in commands
        for name, hint in get_type_hints(function, include_extras=True).items()
        if Path in (kinds := get_args(hint) or (hint,)) or Path in get_args(kinds[0])
    ]
    assert {"lengths", "calibrate", "sbatch", "config"} <= {name for function, name, _ in paths if function == "plan"}
    for function, name, hint in paths:
        assert hint is not Path and hint.__metadata__[0].parser is expanded_path, (function, name)


def test_another_config_is_named_for_its_gpus_alone():
    """512 are what this one is made for too: what is refused is another thing, or the layout that is given beside it."""
    for words, searched in (("model.offload_modules=[core_attn]", False), ("parallel.etp=8", True)):
        found = CliRunner().invoke(app, ["plan", ZERO, "--gpus", "512", words])
        said = str(found.exception)
        assert (
            words.split("=")[0].split(".")[1] in said and "is made for" not in said and ("--search" in said) == searched
        )


@pytest.mark.parametrize("text", ["", "500,600\n", "12.5\n", "500\n0\n", "tokens\n"])
def test_lengths_that_are_none(text, tmp_path):
    (tmp_path / "lengths").write_text(text)
    found = CliRunner().invoke(app, ["plan", ZERO, "--gpus", "512", "--lengths", str(tmp_path / "lengths")])
    assert isinstance(found.exception, ConfigError) and "one" in str(found.exception)


@pytest.mark.parametrize(
    "words",
    [("--gpus", "0"), ("--mean", "0"), ("--mean", "nan"), ("--cv", "11"), ("--imbalance", "0.5"), ("--prompt", "0")],
)
def test_what_is_out_of_bounds_is_a_usage_error(words):
    found = CliRunner().invoke(app, ["plan", ZERO, *words])
    assert found.exit_code == 2 and words[0] in found.output


def test_a_stage_that_is_not_planned_is_not_said_to_train_nothing():
    found = CliRunner().invoke(app, ["plan", str(REPOSITORY / "configs/nano/base.yaml"), "--gpus", "4"])
    assert isinstance(found.exception, ConfigError) and "a stage base is not planned" in str(found.exception)
