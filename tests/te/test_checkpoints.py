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
from tests.te import stand_in

ENGINE, LOCAL = stand_in.install, None
SMALL = MTP | {"vocab_size": 97}  # padded under TP


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """(a converted checkpoint, its config)."""
    base = tmp_path_factory.mktemp("start")
    hf = write_hub_directory(base / "hf", SMALL, hub_state(SMALL, torch.float32))
    source = run_conversion(ToMegatron(hf, Layout(), dtype=torch.float32), base / "start", Alone())
    return source, read_config(source)


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory):
    """Runs that saved after two steps and went on to four: TP 2 x EP 2 of Transformer Engine, one process of the local layers."""
    source, config = start
    base = tmp_path_factory.mktemp("runs")
    launch(
        save_run, 2, base / "engine", config, {"tp": 2, "ep": 2}, source, "float32", False,
        timeout_seconds=200, prepare=ENGINE,
    )  # fmt: skip
    launch(save_run, 1, base / "local", config, {}, source, "float32", False, timeout_seconds=200)
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
        resume_run, ranks, runs / saved_by, start[1], "float32", cases, timeout_seconds=200, prepare=loaded_by
    ):
        assert len(results) == len(cases)
        for name, (changed, losses, weights) in results.items():
            assert not_aliases(changed) == [], name
            assert losses <= 1e-5, name
            assert weights <= 1e-5, name


def not_aliases(names: list[str]) -> list[str]:
    """Without the norms that the two kinds of layers keep in different places; the weights after the steps tell of those."""
    return [name for name in names if alias(name) is None]


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_fp8_saves_and_goes_on(start, tmp_path, recipe):
    """In the same layout to the last bit; weights and (empty) extra states also load in another one and without FP8."""
    source, config = start
    run = tmp_path / recipe
    launch(
        save_run, 1, run, config, {}, source, "bfloat16", False, recipe, timeout_seconds=200, prepare=ENGINE
    )  # fmt: skip
    cases = [({}, 2), ({}, 0)]
    (results,) = launch(
        resume_run, 1, run, config, "bfloat16", cases, recipe, timeout_seconds=200, prepare=ENGINE
    )
    assert results == {f"{layout} from {step}": ([], 0.0, 0.0) for layout, step in cases}
    for ranks, layout, prepare, fp8 in ((2, {"tp": 2, "ep": 2}, ENGINE, recipe), (1, {}, LOCAL, "off")):
        for results in launch(
            resume_run, ranks, run, config, "bfloat16", [(layout, 2)], fp8, timeout_seconds=200, prepare=prepare
        ):
            ((changed, losses, _weights),) = results.values()
            assert not_aliases(changed) == []
            assert losses <= 0.3, layout  # losses and norms of 4 to 8; in 8 bits, in another order or not in 8 bits
