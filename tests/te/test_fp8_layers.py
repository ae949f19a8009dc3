"""Layers that really quantise, against the recipes in float64: forward, and the gradients of everything."""

from __future__ import annotations

import pytest
import torch

from tests.te import fp8_reference

RECIPES = ("tensorwise", "blockwise")
TOLERANCE = 1e-5
"""Of the largest entry: what summing up in float32 costs. Quantising moves results by 1e-2."""


@pytest.fixture
def recipe(request, transformer_engine):
    """(name, Transformer Engine's recipe for it)."""
    from transformer_engine.common.recipe import Float8BlockScaling, Float8CurrentScaling, Format

    made = {"tensorwise": lambda: Float8CurrentScaling(fp8_format=Format.HYBRID),
            "blockwise": lambda: Float8BlockScaling(fp8_format=Format.E4M3)}  # fmt: skip
    return request.param, made[request.param]()


def drawn(*shape: int, seed: int) -> torch.Tensor:
    """Magnitudes over nine orders of ten, so that blocks differ in scale and small numbers become subnormal or zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator) * torch.exp(torch.randn(*shape, generator=generator))
    return values * torch.exp(2 * torch.randn(shape[0], 1, generator=generator))


def run(layer, x, gradient, recipe, *further):
    from transformer_engine import pytorch as te

    x = x.clone().requires_grad_()
    with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
        y = layer(x, *further)
    y.backward(gradient)
    return y.detach(), x.grad


def assert_close(found, expected, unquantised):
    """Equal but for summing up in float32; and the test would see it if nothing were quantised."""
    scale = expected.abs().max()
    assert (found.double() - expected).abs().max() <= TOLERANCE * scale
    if expected.numel():
        assert (unquantised - expected).abs().max() > 100 * TOLERANCE * scale


@pytest.mark.parametrize("form", ["E4M3", "E5M2"])
def test_rounding_by_definition_is_the_hardware_formats(form):
    """Every number of 8 bits, what lies halfway between two, and random ones: as torch converts them."""
    dtype = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2}[form]
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    every = every[every.isfinite()].sort().values
    values = torch.cat([every, (every[1:] + every[:-1]) / 2, drawn(1000, 1, seed=0)[:, 0]])
    limit = torch.finfo(dtype).max
    assert torch.equal(
        getattr(fp8_reference, form).round(values.double()), values.clamp(-limit, limit).to(dtype).double()
    )


@pytest.mark.parametrize("recipe", RECIPES, indirect=True)
@pytest.mark.parametrize("tokens", [16, 208])
def test_linear(recipe, tokens):
    from transformer_engine import pytorch as te

    x, weight, gradient = drawn(tokens, 272, seed=1), drawn(144, 272, seed=2), drawn(tokens, 144, seed=3)
    x[3], weight[5] = 0, 0  # a token and a row without any magnitude
    layer = te.Linear(272, 144, bias=False, params_dtype=torch.float32, device="cpu")
    layer.weight.data.copy_(weight)
    y, dx = run(layer, x, gradient, recipe[1])
    x, weight, gradient = x.double(), weight.double(), gradient.double()
    expected = fp8_reference.linear(recipe[0], x, weight, gradient)
    unquantised = (x @ weight.T, gradient @ weight, gradient.T @ x)
    for found, want, plain in zip((y, dx, layer.weight.grad), expected, unquantised, strict=True):
        assert_close(found, want, plain)


@pytest.mark.parametrize("recipe", RECIPES, indirect=True)
@pytest.mark.parametrize("splits", [[16, 0, 48, 144], [0, 0, 208, 0], [0, 0, 0, 0]])
def test_grouped_linear_with_uneven_and_empty_experts(recipe, splits):
    from transformer_engine import pytorch as te

    tokens = sum(splits)
    x, gradient = drawn(208, 128, seed=1)[:tokens], drawn(208, 160, seed=3)[:tokens]
    weights = [drawn(160, 128, seed=10 + i) for i in range(len(splits))]
    layer = te.GroupedLinear(len(splits), 128, 160, bias=False, params_dtype=torch.float32, device="cpu")
    for number, weight in enumerate(weights):
        getattr(layer, f"weight{number}").data.copy_(weight)
    y, dx = run(layer, x, gradient, recipe[1], splits)
    x, gradient, weights = x.double(), gradient.double(), [w.double() for w in weights]
    want_y, want_dx, want_weights = fp8_reference.grouped_linear(recipe[0], x, weights, gradient, splits)
    parts = list(zip(torch.split(x, splits), weights, torch.split(gradient, splits), strict=True))
    if tokens:
        assert_close(y, want_y, torch.cat([part @ w.T for part, w, _ in parts]))
        assert_close(dx, want_dx, torch.cat([g @ w for _, w, g in parts]))
    assert y.shape == (tokens, 160)
    assert dx.shape == (tokens, 128)
    for number, (want, (part, _, g)) in enumerate(zip(want_weights, parts, strict=True)):
        found = getattr(layer, f"weight{number}").grad
        if splits[number]:
            assert_close(found, want, g.T @ part)
        else:
            assert found is None or not found.any()


@pytest.mark.parametrize("recipe", RECIPES, indirect=True)
def test_norm_and_linear(recipe):
    from transformer_engine import pytorch as te

    x, weight, gradient = drawn(96, 272, seed=1), drawn(144, 272, seed=2), drawn(96, 144, seed=3)
    scale = 1 + 0.3 * drawn(1, 272, seed=4)[0].clamp(-2, 2)
    layer = te.LayerNormLinear(
        272, 144, eps=1e-6, bias=False, normalization="RMSNorm", params_dtype=torch.float32, device="cpu"
    )
    layer.weight.data.copy_(weight)
    layer.layer_norm_weight.data.copy_(scale)
    y, dx = run(layer, x, gradient, recipe[1])
    x, scale, weight, gradient = x.double(), scale.double(), weight.double(), gradient.double()
    expected = fp8_reference.norm_linear(recipe[0], x, scale, weight, gradient, 1e-6)
    x, scale, weight = (t.requires_grad_() for t in (x, scale, weight))
    plain = (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * scale) @ weight.T
    plain.backward(gradient)
    found = (y, dx, layer.layer_norm_weight.grad, layer.weight.grad)
    for one, want, exact in zip(found, expected, (plain.detach(), x.grad, scale.grad, weight.grad), strict=True):
        assert_close(one, want, exact)
