"""Every operation of the stand-in against float64: loops and plain formulas, written apart from it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.te.draws import close, normal

SHAPES = ((1, 1), (3, 128), (128, 130), (200, 257))
BLOCK = 128


# ---------------------------------------------------------------------- FP8, by hand


def fp8_values(name: str) -> torch.Tensor:
    """Every finite number of an 8-bit format, from its bits: sign, exponent, mantissa."""
    exponent_bits, mantissa_bits, bias = {"e4m3": (4, 3, 7), "e5m2": (5, 2, 15)}[name]
    found = []
    for exponent, mantissa in itertools.product(range(2**exponent_bits), range(2**mantissa_bits)):
        if name == "e4m3" and (exponent, mantissa) == (15, 7):
            continue  # not a number
        if name == "e5m2" and exponent == 31:
            continue  # infinity and not a number
        fraction = mantissa / 2**mantissa_bits
        found.append((1 + fraction) * 2.0 ** (exponent - bias) if exponent else fraction * 2.0 ** (1 - bias))
    return torch.tensor(found, dtype=torch.float64)


FORMATS = {"e4m3": fp8_values("e4m3"), "e5m2": fp8_values("e5m2")}


def nearest(values: torch.Tensor, name: str) -> torch.Tensor:
    """The nearest numbers of the format, ties to the even mantissa (which is the even place in the table)."""
    table = FORMATS[name]
    magnitude = values.abs().clamp(max=table[-1])
    above = torch.searchsorted(table, magnitude).clamp(max=len(table) - 1)
    below = (above - 1).clamp(min=0)
    up, down = table[above] - magnitude, magnitude - table[below]
    take_below = (down < up) | ((down == up) & (below % 2 == 0))
    return torch.where(take_below, table[below], table[above]) * values.sign()


def scale_for(largest: float, name: str, power_of_two: bool) -> float:
    """What brings `largest` to the top of the format, in float32's arithmetic."""
    if largest == 0:
        return 1.0
    scale = float(torch.tensor(float(FORMATS[name][-1])) / torch.tensor(largest))
    return 2.0 ** math.floor(math.log2(scale)) if power_of_two else scale


def rounded(matrix: torch.Tensor, name: str, power_of_two: bool, tile: tuple[int, int] | None) -> torch.Tensor:
    """A matrix as FP8 holds it: a scale for each tile (None: for all of it)."""
    matrix = matrix.double()
    height, width = tile or matrix.shape
    result = torch.zeros_like(matrix)
    for row, column in itertools.product(range(0, matrix.shape[0], height), range(0, matrix.shape[1], width)):
        part = matrix[row : row + height, column : column + width]
        scale = scale_for(float(part.abs().max()), name, power_of_two)
        scaled = (part.float() * torch.tensor(scale)).double()
        inverse = float(1 / torch.tensor(scale))
        result[row : row + height, column : column + width] = nearest(scaled, name) * inverse
    return result


DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def block_quantizer(name: str, dimension: int, power_of_two: bool = True, **usage: bool):
    from transformer_engine.pytorch.constants import TE_DType
    from transformer_engine.pytorch.tensor import Float8BlockQuantizer

    usage = {"rowwise": True, "columnwise": True} | usage
    return Float8BlockQuantizer(
        TE_DType[DTYPES[name]], block_scaling_dim=dimension, force_pow_2_scales=power_of_two, **usage
    )


def tensor_quantizer(name: str, power_of_two: bool = False, **usage: bool):
    from transformer_engine.pytorch.constants import TE_DType
    from transformer_engine.pytorch.tensor import Float8CurrentScalingQuantizer

    usage = {"rowwise": True, "columnwise": True} | usage
    return Float8CurrentScalingQuantizer(
        TE_DType[DTYPES[name]], torch.device("cpu"), force_pow_2_scales=power_of_two, **usage
    )


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_tensorwise(transformer_engine, shape, power_of_two, name):
    values = normal(*shape) * 3.7
    expected = rounded(values, name, power_of_two, None)
    close(tensor_quantizer(name, power_of_two)(values).dequantize(), expected)
    turned = tensor_quantizer(name, power_of_two, rowwise=False)(values)  # as its transpose only
    close(turned.dequantize(), expected)


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dimension", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_blockwise(transformer_engine, shape, dimension, power_of_two, name):
    values = normal(*shape) * torch.logspace(-3, 3, shape[1])  # blocks of very different size
    tile = (1, BLOCK) if dimension == 1 else (BLOCK, BLOCK)
    rows = block_quantizer(name, dimension, power_of_two, columnwise=False)(values)
    close(rows.dequantize(), rounded(values, name, power_of_two, tile))
    columns = block_quantizer(name, dimension, power_of_two, rowwise=False)(values)
    close(columns.dequantize(), rounded(values.T, name, power_of_two, tile).T)


@pytest.mark.parametrize("kind", ["tensorwise", "blockwise"])
def test_zeros_and_empty_tensors(transformer_engine, kind):
    quantizer = tensor_quantizer("e4m3") if kind == "tensorwise" else block_quantizer("e4m3", 1)
    assert quantizer(torch.zeros(4, 128)).dequantize().eq(0).all()
    assert quantizer(torch.zeros(0, 128)).dequantize().shape == (0, 128)


def test_an_update_in_place_and_one_that_is_not_to_be(transformer_engine, tex):
    quantizer = block_quantizer("e4m3", 2)
    held = quantizer(normal(130, 140))
    quantizer.update_quantized(normal(130, 140, seed=1), held)
    close(held.dequantize(), rounded(normal(130, 140, seed=1), "e4m3", True, (BLOCK, BLOCK)))
    tex.quantize(normal(130, 140, seed=2), quantizer, held, torch.ones(1))
    close(held.dequantize(), rounded(normal(130, 140, seed=1), "e4m3", True, (BLOCK, BLOCK)))


def test_split_quantize_and_bias_gradient(transformer_engine, tex):
    values, splits = normal(9, 256), [4, 0, 5]
    quantizers = [block_quantizer("e4m3", 1) for _ in splits]
    for part, found in zip(values.split(splits), tex.split_quantize(values, splits, quantizers), strict=True):
        close(found.dequantize(), rounded(part, "e4m3", True, (1, BLOCK)))
    summed, found = tex.bgrad_quantize(values, tensor_quantizer("e5m2"))
    close(summed, values.double().sum(0))
    close(found.dequantize(), rounded(values, "e5m2", False, None))


def test_transpose_of_bytes(tex):
    data = torch.arange(24, dtype=torch.uint8).view(2, 3, 4)
    expected = torch.stack([data[..., i] for i in range(4)])
    assert torch.equal(tex.fp8_transpose(data, tex.DType.kFloat8E4M3), expected)
    assert torch.equal(tex.fp8_transpose(data, tex.DType.kFloat8E4M3, out=torch.zeros_like(expected)), expected)


def test_formats_without_a_stand_in_say_so(transformer_engine, tex):
    from transformer_engine.pytorch.tensor import MXFP8Quantizer

    quantizer = MXFP8Quantizer(tex.DType.kFloat8E4M3)
    with pytest.raises(NotImplementedError, match="MXFP8Quantizer"):
        tex.quantize(torch.zeros(32, 32), quantizer, torch.zeros(32, 32))


# ---------------------------------------------------------------------- products


def product(a: torch.Tensor, b: torch.Tensor, layout: str) -> torch.Tensor:
    """B op A in float64, entry by entry of what is summed over."""
    a, b = a.double(), b.double().flatten(0, -2)
    if layout == "TN":
        return torch.einsum("nk,mk->mn", a, b)
    return torch.einsum("kn,mk->mn", a, b) if layout == "NN" else torch.einsum("mk,mn->nk", a, b)


PRODUCT_SHAPES = {"TN": ((5, 7), (2, 3, 7)), "NN": ((7, 5), (2, 3, 7)), "NT": ((6, 5), (6, 7))}


@pytest.mark.parametrize("layout", ["TN", "NN", "NT"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_general_gemm(transformer_engine, layout, dtype):
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    a, b = (normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate(PRODUCT_SHAPES[layout]))
    expected = product(a, b, layout).view(*(b.shape[:-1] if layout != "NT" else b.shape[-1:]), -1)
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    close(general_gemm(a, b, layout=layout, out_dtype=dtype)[0], expected, tolerance)
    close(general_gemm(a, b, layout=layout, out_dtype=torch.float32)[0], expected)
    held = normal(*expected.shape, seed=2)
    before = held.clone()
    found = general_gemm(a, b, layout=layout, out=held, accumulate=True, alpha=0.5)[0]
    assert found is held
    close(held, before.double() * 0 + 0.5 * expected + before.double())


def test_a_bias_and_its_gradient(transformer_engine):
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    a, b, bias = normal(5, 7), normal(6, 7, seed=1), normal(5, seed=2)
    close(general_gemm(a, b, bias=bias)[0], product(a, b, "TN") + bias.double())
    gradient, x = normal(6, 5), normal(6, 7, seed=1)  # of the weight: NT
    found, of_bias, *_ = general_gemm(x, gradient, layout="NT", grad=True, bias=bias)
    close(found, product(x, gradient, "NT"))
    close(of_bias, gradient.double().sum(0))


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_products_of_fp8_read_the_scales_along_what_is_summed(transformer_engine, recipe):
    """Output, gradient of the input and of the weight of a linear layer, each from the values that its kernel reads."""
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    x, weight, gradient = normal(144, 384), normal(256, 384, seed=1), normal(144, 256, seed=2)
    x, gradient = x * torch.logspace(-2, 2, 144)[:, None], gradient * torch.logspace(2, -2, 256)
    if recipe == "tensorwise":
        quantizers = [tensor_quantizer("e4m3"), tensor_quantizer("e4m3"), tensor_quantizer("e5m2")]
        tiles, formats, power_of_two = (None, None, None), ("e4m3", "e4m3", "e5m2"), False
    else:
        quantizers = [block_quantizer("e4m3", 1), block_quantizer("e4m3", 2), block_quantizer("e4m3", 1)]
        tiles, formats, power_of_two = ((1, BLOCK), (BLOCK, BLOCK), (1, BLOCK)), ("e4m3",) * 3, True
    held = [q(t) for q, t in zip(quantizers, (x, weight, gradient), strict=True)]
    rows = [rounded(t, f, power_of_two, tile) for t, f, tile in zip((x, weight, gradient), formats, tiles, strict=True)]
    columns = [
        rounded(t.T, f, power_of_two, tile).T for t, f, tile in zip((x, weight, gradient), formats, tiles, strict=True)
    ]
    output = general_gemm(held[1], held[0], out_dtype=torch.float32)[0]
    close(output, product(rows[1], rows[0], "TN"))
    of_input = general_gemm(held[1], held[2], layout="NN", out_dtype=torch.float32)[0]
    close(of_input, product(columns[1], rows[2], "NN"))
    of_weight = general_gemm(held[0], held[2], layout="NT", out_dtype=torch.float32)[0]
    close(of_weight, product(columns[0], columns[2], "NT"))
    if recipe == "blockwise":
        assert not torch.allclose(rows[0], columns[0], rtol=1e-3)  # so that reading the other ones would show


SPLITS = ([4, 4, 4], [1, 0, 7, 3], [0, 0, 5], [0, 0])


@pytest.mark.parametrize("splits", SPLITS, ids=str)
@pytest.mark.parametrize("fp8", [False, True])
def test_grouped_gemm(transformer_engine, splits, fp8):
    from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm

    none = [None] * len(splits)
    x = normal(sum(splits), 128)
    weights = [normal(256, 128, seed=i) for i in range(len(splits))]
    gradient = normal(sum(splits), 256, seed=9)
    tile = (1, BLOCK) if fp8 else None
    parts = [list(t.split(splits)) for t in (x, weights, gradient) if t is not weights]
    given = [[block_quantizer("e4m3", 1)(p) for p in side] if fp8 else side for side in parts]
    held = [block_quantizer("e4m3", 2)(w) for w in weights] if fp8 else weights

    def values(side, turned=False, tile=tile):
        if not fp8:
            return side
        return [rounded(p.T, "e4m3", True, tile).T if turned else rounded(p, "e4m3", True, tile) for p in side]

    exact = values(weights, tile=(BLOCK, BLOCK))
    out = [torch.full((sum(splits), 256), torch.nan)]
    general_grouped_gemm(held, given[0], out, none, torch.float32, m_splits=splits, single_output=True)
    expected = torch.cat([product(w, p, "TN") for w, p in zip(exact, values(parts[0]), strict=True)])
    close(out[0], expected)
    out = [torch.full((sum(splits), 128), torch.nan)]
    general_grouped_gemm(held, given[1], out, none, torch.float32, layout="NN", m_splits=splits, single_output=True)
    close(out[0], torch.cat([product(w, p, "NN") for w, p in zip(exact, values(parts[1]), strict=True)]))
    for accumulate in (False, True):
        out = [normal(256, 128, seed=20 + i) for i in range(len(splits))]
        before = [o.double() * accumulate for o in out]
        general_grouped_gemm(
            given[0], given[1], out, none, torch.float32, layout="NT", grad=True, accumulate=accumulate
        )
        sides = zip(values(parts[0], True), values(parts[1], True), before, out, strict=True)
        for p, g, held_before, found in sides:
            close(found, product(p, g, "NT") + held_before)


# ---------------------------------------------------------------------- norms, softmax


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rmsnorm(transformer_engine, tex, dtype, zero_centered):
    x, weight, gradient = (
        normal(3, 4, 33, dtype=dtype),
        normal(33, seed=1, dtype=dtype),
        normal(3, 4, 33, seed=2, dtype=dtype),
    )
    exact = [t.double().requires_grad_() for t in (x, weight)]
    gain = exact[1] + 1 if zero_centered else exact[1]
    expected = exact[0] / (exact[0].pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * gain
    expected.backward(gradient.double())
    number = int(tex.DType.kFloat32 if dtype == torch.float32 else tex.DType.kBFloat16)
    found, _, inverse = tex.rmsnorm_fwd(x, weight, 1e-3, None, None, number, 0, zero_centered)
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    assert found.dtype == dtype
    close(found, expected.detach(), tolerance)
    close(inverse, (x.double().pow(2).mean(-1) + 1e-3).rsqrt().flatten())
    of_x, of_weight = tex.rmsnorm_bwd(gradient, x, inverse, weight, 0, zero_centered)
    close(of_x, exact[0].grad, tolerance)
    close(of_weight, exact[1].grad, tolerance)


def test_rmsnorm_quantizes_what_it_would_give(transformer_engine, tex):
    x, weight = normal(8, 256), normal(256, seed=1)
    plain = tex.rmsnorm_fwd(x, weight, 1e-6, None, None, int(tex.DType.kFloat32), 0, False)[0]
    found = tex.rmsnorm_fwd(x, weight, 1e-6, None, block_quantizer("e4m3", 1), int(tex.DType.kFloat32), 0, False)[0]
    close(found.dequantize(), rounded(plain, "e4m3", True, (1, BLOCK)))


@pytest.mark.parametrize("masked", [False, True])
def test_softmax(tex, masked):
    scores, gradient = normal(2, 4, 8, 24, dtype=torch.bfloat16), normal(2, 4, 8, 24, seed=1, dtype=torch.bfloat16)
    mask = torch.zeros(2, 1, 8, 24, dtype=torch.bool)
    if masked:
        mask = normal(2, 1, 8, 24, seed=3) > 0.5
        mask[0, 0, 2] = True  # nothing to attend to
    exact = scores.double().requires_grad_()
    weights = (0.3 * exact).exp() * ~mask
    expected = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    expected.backward(gradient.double())
    found = tex.scaled_masked_softmax_forward(scores, mask, 0.3) if masked else tex.scaled_softmax_forward(scores, 0.3)
    close(found, expected.detach(), 4e-3)
    backward = tex.scaled_masked_softmax_backward if masked else tex.scaled_softmax_backward
    close(backward(gradient, found, 0.3), exact.grad, 1e-2)


# ---------------------------------------------------------------------- many tensors


@pytest.mark.parametrize("mode", [0, 1], ids=["added", "decoupled"])
@pytest.mark.parametrize("bias_correction", [0, 1])
def test_adam(tex, mode, bias_correction):
    sizes, lr, beta1, beta2, eps, decay = (3, 5), 0.1, 0.9, 0.99, 1e-4, 0.2
    gradients = [[normal(n, seed=10 * step + n) for n in sizes] for step in range(3)]
    held = [[normal(n, seed=n) for n in sizes], [torch.zeros(n) for n in sizes], [torch.zeros(n) for n in sizes]]
    exact = [[[float(v) for v in t] for t in part] for part in held]
    for step, found in enumerate(gradients, start=1):
        tex.multi_tensor_adam(
            2048, torch.zeros(1), [found, *held], lr, beta1, beta2, eps, step, mode, bias_correction, decay
        )
        for i, j in ((i, j) for i, n in enumerate(sizes) for j in range(n)):
            g, p = float(found[i][j]), exact[0][i][j]
            g += decay * p if mode == 0 else 0
            exact[1][i][j] = m = beta1 * exact[1][i][j] + (1 - beta1) * g
            exact[2][i][j] = v = beta2 * exact[2][i][j] + (1 - beta2) * g * g
            if bias_correction:
                m, v = m / (1 - beta1**step), v / (1 - beta2**step)
            exact[0][i][j] = p - lr * (m / (math.sqrt(v) + eps) + (decay * p if mode == 1 else 0))
    for part, expected in zip(held, exact, strict=True):
        for tensor, values in zip(part, expected, strict=True):
            close(tensor, torch.tensor(values, dtype=torch.float64))


@pytest.mark.parametrize("narrow", [("exp_avg", "exp_avg_sq"), ("exp_avg",)], ids=str)
def test_fused_adam_with_moments_in_bfloat16_is_the_one_of_the_cpu(tex, narrow):
    """Transformer Engine's class, with what r1mega asks of it: its state before a step, after some, and loaded again."""
    from transformer_engine.pytorch.optimizers import FusedAdam as Theirs

    from r1mega.platform.adam import FusedAdam

    settings = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-4, "weight_decay": 0.1, "master_weights": True}
    settings |= {f"{name}_dtype": torch.bfloat16 for name in narrow} | {"use_decoupled_grad": True}
    weights, state = {}, {}
    for kind in (FusedAdam, Theirs):
        held = [
            normal(7, 5, dtype=torch.bfloat16).requires_grad_(),
            normal(9, seed=1, dtype=torch.bfloat16).requires_grad_(),
        ]
        optimizer = kind(held, **settings)
        for weight in held:
            optimizer.initialize_state(weight, False)
        for step in range(6):
            if step == 3:  # as r1mega saves it: without the copies in float32 that Theirs would make
                saved = torch.optim.Optimizer.state_dict(optimizer)
                optimizer = kind(held, **settings)
                optimizer.load_state_dict(saved)
            for i, weight in enumerate(held):
                weight.decoupled_grad = normal(*weight.shape, seed=10 * step + i, dtype=torch.bfloat16)
            optimizer.step()
        optimizer.zero_grad()
        assert [weight.decoupled_grad for weight in held] == [None, None]
        weights[kind], state[kind] = held, [optimizer.state[weight] for weight in held]
    for ours, theirs, weight in zip(state[FusedAdam], state[Theirs], weights[Theirs], strict=True):
        assert {name: value.dtype for name, value in ours.items()} == {
            name: value.dtype for name, value in theirs.items()
        }
        assert {name for name, value in theirs.items() if value.dtype == torch.bfloat16} == set(narrow)
        close(ours["master_param"], theirs["master_param"], 1e-4)
        for name in ("exp_avg", "exp_avg_sq"):
            close(ours[name], theirs[name], 2.0**-7)
        assert torch.equal(theirs["master_param"].bfloat16(), weight)


def test_norms_and_scaling(tex):
    tensors = [normal(3), normal(2, 4, seed=1)]
    total, each = tex.multi_tensor_l2norm(2048, torch.zeros(1, dtype=torch.int32), [tensors], True)
    expected = [math.sqrt(sum(float(v) ** 2 for v in t.flatten())) for t in tensors]
    close(each, torch.tensor(expected, dtype=torch.float64))
    close(total, torch.tensor([math.hypot(*expected)], dtype=torch.float64))
    flag, scaled = torch.zeros(1, dtype=torch.int32), [torch.empty_like(t) for t in tensors]
    tex.multi_tensor_scale(2048, flag, [tensors, scaled], 0.3)
    for found, tensor in zip(scaled, tensors, strict=True):
        close(found, 0.3 * tensor.double())
    assert flag == 0
    again = [torch.empty_like(t) for t in scaled]
    tex.multi_tensor_scale_tensor(2048, flag, [tensors, again], torch.tensor([0.3]))
    assert all(torch.equal(a, b) for a, b in zip(again, scaled, strict=True))
    tex.multi_tensor_scale(2048, flag, [[torch.tensor([torch.inf])], [torch.empty(1)]], 0.3)
    assert flag == 1


# ---------------------------------------------------------------------- what is not there


def test_absent_operations_raise_by_name(transformer_engine, tex):
    from transformer_engine.pytorch.triton.cross_entropy import cross_entropy_forward

    with pytest.raises(NotImplementedError, match="transformer_engine_torch.fused_rope_forward"):
        tex.fused_rope_forward(torch.zeros(1))
    with pytest.raises(
        NotImplementedError, match="transformer_engine.pytorch.triton.cross_entropy.cross_entropy_forward"
    ):
        cross_entropy_forward(torch.zeros(1))
    with pytest.raises(AttributeError):
        tex.no_such_operation  # noqa: B018 (neither does the compiled module have it)


def test_other_tests_of_this_process_find_no_transformer_engine(transformer_engine):
    from tests.te import stand_in
    from tests.te.stand_in import importer

    assert transformer_engine.__version__ == stand_in.VERSION
    with importer.loaded(stand_in.directory()):
        pass
    with pytest.raises(ModuleNotFoundError):
        import transformer_engine.pytorch  # noqa: F401
    with importer.loaded(stand_in.directory()) as again:
        assert again is transformer_engine
