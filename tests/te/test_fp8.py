"""FP8 in a whole model: every packed length, padding that changes nothing, recomputed log-probs, bounds against float32,
layers that are left out. Layers one by one: test_fp8_layers.py.
"""

from __future__ import annotations

import statistics

import pytest

from tests.dist.launch import launch

RECIPES = ("tensorwise", "blockwise")
LAYOUTS = {"tp2 ep2": {"tp": 2, "ep": 2}, "cp2": {"cp": 2}}
BOUNDS = {"log_probs": (0.06, 0.25), "gradients": (0.2, 0.35)}
"""Of a model with random weights against the same in float32: mean and largest |difference| of a log-prob; median and largest
relative difference of a gradient."""


def one_rank():
    from tests.te import fp8_worker  # imports megatron, which must find Transformer Engine

    return fp8_worker.one_rank()


def two_ranks(layouts):
    from tests.te import fp8_worker

    return fp8_worker.two_ranks(layouts)


@pytest.fixture(scope="module")
def found():
    return launch(one_rank, 1, preload="tests.te.preload", timeout_seconds=600)[0]


@pytest.fixture(scope="module")
def of_two_ranks():
    return launch(two_ranks, 2, list(LAYOUTS.values()), preload="tests.te.preload", timeout_seconds=600)


def assert_within_bounds(checks):
    mean, largest = checks["log_probs"]
    differences = checks["gradients"].values()
    print(f"log-probs {mean:.3f} {largest:.3f}, gradients {statistics.median(differences):.3f} {max(differences):.3f}")
    assert mean < BOUNDS["log_probs"][0]
    assert largest < BOUNDS["log_probs"][1]
    assert mean > 1e-3, "nothing was quantised"
    assert statistics.median(differences) < BOUNDS["gradients"][0]
    assert max(differences) < BOUNDS["gradients"][1], max(checks["gradients"].items(), key=lambda item: item[1])


@pytest.mark.parametrize(
    ("recipe", "parts"),
    [("tensorwise", ("recipe_type=Float8CurrentScaling", "format=HYBRID", "fp8_quant_fwd_inp=Qparams(power_2_scale=False")),
     ("blockwise", ("recipe_type=Float8BlockScaling", "format=E4M3", "x_block_scaling_dim=1", "w_block_scaling_dim=2",
                    "grad_block_scaling_dim=1", "fp8_quant_fwd_inp=Qparams(power_2_scale=True"))],
)  # fmt: skip
def test_the_config_key_is_the_recipe_that_the_layers_were_tested_with(found, recipe, parts):
    text = found[recipe]["recipe"].replace("\n", "")
    assert all(part in text for part in parts), text


@pytest.mark.parametrize("recipe", RECIPES)
def test_alignment_is_transformer_engines(found, recipe):
    assert found[recipe]["alignment"] == (16, 16)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_length_gives_the_training_pass_the_log_probs_of_the_pass_without_gradients(found, recipe):
    assert found[recipe]["unequal lengths"] == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_recomputed_activations_change_nothing(found, recipe):
    same_in_both_passes, same_as_without, gradients = found[recipe]["recomputed"]
    assert same_in_both_passes
    assert same_as_without
    assert gradients == 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_results_do_not_depend_on_how_much_padding_there_is(found, recipe):
    """Sums over more tokens may be added up in another order, hence no 0. Padding that is not zero moves a tensor's scale, and
    that is seen; a block's by a power of two, which changes what is close to underflow at most.
    """
    log_probs, gradients = found[recipe]["padding"]
    print("padded further:", log_probs, gradients, "not zeroed:", found[recipe]["padding not zeroed"])
    assert log_probs < 1e-5
    assert gradients < 1e-4
    assert recipe == "blockwise" or found[recipe]["padding not zeroed"] > 0.01


@pytest.mark.parametrize("recipe", RECIPES)
def test_reference_weights_are_quantised_anew(found, recipe):
    assert found[recipe]["reference"] == [True, True, True]


@pytest.mark.parametrize("recipe", RECIPES)
def test_log_probs_and_gradients_are_near_those_in_float32(found, recipe):
    assert_within_bounds(found[recipe])


@pytest.mark.parametrize(
    ("first", "last", "unquantised"),
    [(0, 0, [False, False, False]), (1, 0, [True, False, False]), (0, 1, [False, False, True]),
     (1, 1, [True, False, True]), (2, 0, [True, True, False])],
)  # fmt: skip
def test_layers_at_the_ends_are_left_out_by_key(found, first, last, unquantised):
    assert found["unquantised layers", first, last] == unquantised


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks(of_two_ranks, layout, recipe):
    """Lengths that ranks cut to less than an alignment, microbatches without samples, ranks whose experts get no token."""
    for rank in of_two_ranks:
        found = rank[list(LAYOUTS).index(layout)][recipe]
        assert found["unequal lengths"] == []
        assert_within_bounds(found)
