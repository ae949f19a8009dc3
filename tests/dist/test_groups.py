"""The launcher itself, and what ranks must agree on."""

from __future__ import annotations

import os
import signal
import time

import pytest

from r1mega.errors import CheckpointError, ConfigError
from r1mega.platform import groups
from r1mega.platform.signals import StopRequest
from tests.dist.launch import RankError, launch
from tests.reference import DEEPSEEK, Layout, ModelSettings, make_reference


def fail_on_rank_one() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("broken on purpose")
    time.sleep(60)


def sleep() -> None:
    time.sleep(60)


INITIAL_LAYOUTS = {"ep": Layout(ep=2), "tp": Layout(tp=2, ep=2)}


def initial_weights(layout: Layout) -> dict[str, float]:
    """Name -> checksum of every parameter of a model drawn from seed 1."""

    from r1mega.model.build import build_model

    groups.init_parallel(layout, seed=0)
    (model,) = build_model(DEEPSEEK, layout, ModelSettings(), seed=1, init_std=0.02)
    groups.destroy_parallel()
    return {n: float(p.detach().double().abs().sum()) for n, p in model.named_parameters()}


def two_ranks_agree() -> dict[str, object]:
    """A stop asked of rank 1 only; weights that misfit on a layer of stage 1 only; a layout that does not divide."""
    groups.init_distributed()
    rank, found = int(os.environ["RANK"]), {}
    with StopRequest() as stop:
        found["before"] = stop.agreed()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        found["after"] = (stop.requested, stop.agreed())
    try:
        groups.init_parallel(Layout(tp=3), seed=0)
    except ConfigError as error:
        found["layout"] = str(error)
    found |= {f"init {name}": initial_weights(layout) for name, layout in INITIAL_LAYOUTS.items()}
    groups.init_parallel(Layout(pp=2), seed=0)
    from r1mega.checkpoint.hf_state import load_hf
    from r1mega.model.build import build_model

    chunks = build_model(DEEPSEEK, Layout(pp=2), ModelSettings())
    state = make_reference(DEEPSEEK).state
    state["model.layers.3.self_attn.o_proj.weight"] = state["model.layers.3.self_attn.o_proj.weight"][:2]
    try:
        load_hf(chunks, state)
    except CheckpointError as error:
        found["misfit"] = str(error)
    groups.destroy()
    return found


def test_a_failing_rank_is_reported_with_its_traceback():
    with pytest.raises(RankError, match="(?s)rank 1:.*broken on purpose"):
        launch(fail_on_rank_one, 2)


def test_a_hanging_rank_is_ended():
    with pytest.raises(RankError, match=r"ranks \[0\] did not finish"):
        launch(sleep, 1, timeout_seconds=3)


def test_ranks_agree():
    results = launch(two_ranks_agree, 2)
    assert [r["before"] for r in results] == [False, False]
    assert [r["after"] for r in results] == [(False, True), (True, True)]
    assert all("2 processes cannot be divided by tp * pp * cp = 3" in r["layout"] for r in results)
    for layout in INITIAL_LAYOUTS:
        one, two = (r[f"init {layout}"] for r in results)
        differing = {name.split(".")[-2] for name in one if one[name] != two[name]}
        cut = {"word_embeddings", "output_layer", "linear_proj", "linear_q_up_proj", "linear_kv_up_proj"}
        # experts of different ranks start different, slices of one tensor too; what ranks share starts equal
        assert differing == {"linear_fc1", "linear_fc2"} | (cut if layout == "tp" else set())
        alike = [name for name in one if ".shared_experts." in name or ".layers.0.mlp." in name]
        assert all((one[name] == two[name]) == (layout == "ep") for name in alike)
    assert all("model.layers.3.self_attn.o_proj.weight is [2, 96]" in r["misfit"] for r in results)


def lead_and_help() -> list[object]:
    """What ranks get of a leader that deals out squares, of one that a helper fails, and of one that fails itself."""
    groups.init_distributed()
    rank, seen = int(os.environ["RANK"]), []

    def square(items):
        seen.append(list(items))
        return [item * item for item in items]

    def fail(items):
        if 7 in items:
            raise CheckpointError("there is a seven")
        return list(items)

    def whole(deal):
        return [deal(square, range(10)), deal(fail, range(3)), deal(square, [])]

    def broken(deal):
        deal(fail, list(range(8)))

    def raising(deal):
        raise ConfigError("nothing to lead")

    found: list[object] = [groups.lead(whole, (square, fail)), seen[0]]
    for make in (broken, raising):
        try:
            groups.lead(make, (square, fail))
        except (CheckpointError, ConfigError) as error:
            found.append(str(error))
    found.append(groups.lead(lambda deal: deal(square, [rank + 5]), (square, fail)))
    groups.DEALT_AT_A_TIME = 4
    found.append(groups.lead(lambda deal: deal(square, range(10)), (square, fail)))
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_help_the_first(ranks):
    results = launch(lead_and_help, ranks)
    squares = [item * item for item in range(10)]
    assert [item for _, block, *_ in results for item in block] == list(range(10))
    assert {len(block) for _, block, *_ in results} <= {10 // ranks, -(-10 // ranks)}
    for found in results:
        assert found[0] == [squares, [0, 1, 2], []]
        assert found[2:] == ["there is a seven", "nothing to lead", [25], squares]
