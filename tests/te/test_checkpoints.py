"""Checkpoints between Transformer Engine's layers and the local ones, in other layouts: weights, optimizer, the next steps."""

from __future__ import annotations

import pytest
import torch

from r1mega.checkpoint.conversion import run_conversion
from r1mega.checkpoint.fit import alias
from r1mega.checkpoint.hf import read_config
from r1mega.checkpoint.to_megatron import ToMegatron
from r1mega.checkpoint.workers import Alone
from tests.checkpoints import MTP, hub_state, write_hub_directory
from tests.dist.convert_worker import resume_run, save_run
from tests.dist.launch import launch
from tests.reference import Layout
from tests.te.checkpoint_worker import resume, save_and_resume

ENGINE, LOCAL = "tests.te.preload", "tests.dist.preload"
"""What the ranks import first: Transformer Engine's layers, or the local ones."""
RECIPES = ["tensorwise", "blockwise"]
SMALL = MTP | {"vocab_size": 97}  # padded under TP


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """(a converted checkpoint, its config)."""
    base = tmp_path_factory.mktemp("start")
    hf = write_hub_directory(base / "hf", SMALL, hub_state(SMALL, torch.float32))
    source = run_conversion(
        ToMegatron(hf, Layout(), dtype=torch.float32, max_file_bytes=100_000), base / "start", Alone()
    )
    return source, read_config(source)


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory):
    """Runs that saved after two steps and went on to four: TP 2 x EP 2 of Transformer Engine, one process of the local layers."""
    source, config = start
    base = tmp_path_factory.mktemp("runs")
    launch(
        save_run, 2, base / "engine", config, {"tp": 2, "ep": 2}, source, "float32", False,
        timeout_seconds=600, preload=ENGINE,
    )  # fmt: skip
    launch(save_run, 1, base / "local", config, {}, source, "float32", False, timeout_seconds=600)
    return base


def test_the_two_kinds_of_layers_take_the_same_steps(runs):
    ours, theirs = (torch.load(runs / name / "uninterrupted.pt") for name in ("local", "engine"))
    for a, b in zip(ours["losses"], theirs["losses"], strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, tensor in ours["weights"].items():
        assert (tensor - theirs["weights"][name]).abs().max() <= 1e-5, name


@pytest.mark.parametrize(
    ("saved_by", "loaded_by", "ranks", "cases"),
    [
        pytest.param("engine", LOCAL, 1, [({}, 2), ({}, 0)], id="engine to local"),
        pytest.param("local", ENGINE, 2, [({"tp": 2}, 2), ({"pp": 2}, 2)], id="local to engine"),
        pytest.param("engine", ENGINE, 2, [({"ep": 2}, 2)], id="engine to engine"),
    ],
)
def test_a_run_goes_on_with_the_other_layers_as_if_uninterrupted(start, runs, saved_by, loaded_by, ranks, cases):
    for results in launch(
        resume_run, ranks, runs / saved_by, start[1], "float32", cases, timeout_seconds=600, preload=loaded_by
    ):
        assert len(results) == len(cases)
        for name, (changed, losses, weights, _distance) in results.items():
            assert not_aliases(changed) == [], name
            assert losses <= 1e-5, name
            assert weights <= 1e-5, name


def not_aliases(names: list[str]) -> list[str]:
    """Without the norms that the two kinds of layers keep in different places; the weights after the steps tell of those."""
    return [name for name in names if alias(name) is None]


@pytest.fixture(scope="module")
def fp8_runs(start, tmp_path_factory):
    """(runs by recipe, saved by one process, their config, what that process found when it went on)."""
    base, (source, config) = tmp_path_factory.mktemp("fp8"), start
    (found,) = launch(save_and_resume, 1, base, config, source, RECIPES, timeout_seconds=600, preload=ENGINE)
    return base, config, found


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_goes_on_to_the_last_bit_in_the_layout_that_saved(fp8_runs, recipe):
    assert fp8_runs[2][recipe] == {"{} from 2": ([], 0.0, 0.0, 0.0), "{} from 0": ([], 0.0, 0.0, 0.0)}


@pytest.mark.parametrize(
    ("ranks", "layout", "preload", "recipes"),
    [(2, {"tp": 2, "ep": 2}, ENGINE, {"blockwise": "blockwise"}), (1, {}, LOCAL, dict.fromkeys(RECIPES, "off"))],
    ids=["tp2 ep2 in FP8", "local"],
)
def test_fp8_checkpoints_load_in_another_layout_and_without_fp8(fp8_runs, ranks, layout, preload, recipes):
    """Weights, moments and (empty) extra states; the steps after it are in 8 bits, in another order, or not in 8 bits."""
    base, config, _ = fp8_runs
    for results in launch(resume, ranks, base, config, layout, recipes, timeout_seconds=600, preload=preload):
        for recipe, (changed, losses, *_weights) in results.items():
            assert not_aliases(changed) == [], recipe
            assert losses <= 0.3, recipe  # losses and gradient norms of 4 to 8
