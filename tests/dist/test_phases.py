"""Memory phases: every key leaves each bit as it was, and in each phase there is what the plan says, to the byte."""

import pytest

from tests.dist.launch import RankError, launch
from tests.dist.phases_worker import ALL, resident, steps, trials

EACH = [
    {"grad_offload": True}, {"optimizer_offload": "rollout"}, {"optimizer_offload": "update"}, {"param_offload": True},
    {"reference_swap": True},
]  # fmt: skip


def check(found):
    """found: without any key, then with some."""
    plain, *others = found
    for other in found:
        for phase, counted in other["counted"].items():
            assert counted == {other["planned"][phase]}, phase
        digests = list(other["files"].values())
        assert digests == [next(iter(plain["files"].values()))] * len(digests), "a save is the same in every phase"
    assert plain["counted"].keys() == plain["planned"].keys()
    for other in others:
        assert other["results"] == plain["results"]
        assert other["weights"] == plain["weights"]


def test_each_key_on_one_rank(tmp_path):
    (found,) = launch(trials, 1, {}, "bfloat16", [{}, *EACH, ALL], tmp_path)
    check(found)
    rollout = [one["planned"]["rollout"] for one in found]
    sizes = found[0]["sizes"]
    moments = sizes["main_params"] + sizes["exp_avg"] + sizes["exp_avg_sq"]
    assert [rollout[0] - bytes_ for bytes_ in rollout[1:]] == [
        sizes["gradients"], moments, moments, sizes["weights"], 0, rollout[0],
    ]  # fmt: skip


def test_weights_that_are_their_own_main_parameters_leave_with_the_weights(tmp_path):
    (found,) = launch(trials, 1, {}, "float32", [{}, ALL, {"optimizer_offload": "rollout"}], tmp_path)
    check(found)
    assert found[0]["sizes"]["main_params"] == 0


OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}


@pytest.mark.parametrize("layout, keys", [({"ep": 2}, OVERLAP), ({"tp": 2}, {}), ({"pp": 2}, {})], ids=str)
def test_all_keys_on_two_ranks(tmp_path, layout, keys):
    for found in launch(trials, 2, layout, "bfloat16", [{}, ALL], tmp_path, keys):
        check(found)


def test_adam_on_the_cpu(tmp_path):
    others = {key: value for key, value in ALL.items() if key != "optimizer_offload"}
    for found in launch(trials, 2, {"ep": 2}, "bfloat16", [{}, others], tmp_path, {"cpu_offload": True}):
        check(found)
        sizes = found[0]["sizes"]
        assert found[0]["counted"]["step"] == {sizes["weights"] + sizes["gradients"]}


PRECISION_AWARE = {"precision_aware": True, "grad_reduce_in_fp32": False}


@pytest.mark.parametrize("layout", [{"ep": 2}, {"pp": 2}], ids=str)
def test_moments_and_main_gradients_in_bfloat16(tmp_path, layout):
    for found in launch(trials, 2, layout, "bfloat16", [{}, ALL], tmp_path, PRECISION_AWARE):
        check(found)
        sizes = found[0]["sizes"]
        assert sizes["exp_avg"] + sizes["exp_avg_sq"] == sizes["main_params"]
        assert sizes["gradients"] == sizes["weights"]


def test_gradients_of_the_weights_type_take_half_and_train_nearly_the_same(tmp_path):
    (wide,), (narrow,) = (
        launch(trials, 1, {}, "bfloat16", [{}], tmp_path / str(wide), {"grad_reduce_in_fp32": wide})
        for wide in (True, False)
    )
    check([narrow[0]])
    assert narrow[0]["sizes"]["gradients"] * 2 == wide[0]["sizes"]["gradients"]
    (_, norm), (_, expected) = narrow[0]["results"][-1], wide[0]["results"][-1]
    assert norm != expected and norm == pytest.approx(expected, rel=2**-7)


def test_resident_memory_follows_the_plan():
    ((found, planned),) = launch(resident, 1)
    assert planned["step"] > 1.4 * planned["rollout"]
    for phase, bytes_ in found.items():
        grown, expected = bytes_ - found["rollout"], planned[phase] - planned["rollout"]
        assert abs(grown - expected) < 0.05 * planned["step"], phase


@pytest.mark.slow
def test_a_run_that_is_killed_while_parts_move_goes_on_bitwise(tmp_path):
    whole = launch(steps, 2, tmp_path / "whole", 3, None)
    kept = []
    for number, phase in ((2, "rollout"), (3, "step")):  # weights and state leave, state comes back
        with pytest.raises(RankError, match="-9"):
            launch(steps, 2, tmp_path / "killed", number, phase)
        kept.append(sorted(path.name for path in (tmp_path / "killed/checkpoints").iterdir()))
    assert kept == [["step_000001"], ["step_000001", "step_000002"]]
    resumed = launch(steps, 2, tmp_path / "killed", 3, None)
    for (all_results, weights), (results, same) in zip(whole, resumed, strict=True):
        assert results == all_results[-2:]
        assert same == weights
