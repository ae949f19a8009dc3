"""grouped_log_prob against float64 log_softmax: values, gradients, rows, extremes, the same bits in any batch."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import weakref

import pytest
import torch

import r1mega_kernels
from r1mega_kernels import grouped_log_prob, grpo_token_loss, linear_log_prob


def exact(logits, targets, temperature, rows=None):
    """log-prob, entropy, logsumexp [3, N] in float64 by torch's own functions, and the leaf that they depend on."""
    leaf = logits.detach().double().requires_grad_()
    scale = torch.as_tensor(temperature, dtype=torch.float64).reshape(-1, 1)
    scaled = leaf / scale
    if rows is not None:
        scaled, targets = scaled[rows], targets[rows]
    log_probs = scaled.log_softmax(-1)
    terms = torch.where(log_probs == -math.inf, 0.0, log_probs.exp() * log_probs)
    chosen = log_probs.gather(1, targets[:, None])[:, 0]
    return torch.stack([chosen, -terms.sum(-1), scaled.logsumexp(-1)]), leaf


def random_case(tokens, vocabulary, dtype, seed=0, spread=4.0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(tokens, vocabulary, generator=generator) * spread).to(dtype)
    return logits, torch.randint(0, vocabulary, (tokens,), generator=generator)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["grouped_log_prob", "linear_log_prob", "grpo_token_loss"])
def test_torch_compile_in_one_graph(native, name):
    """With rows, a temperature for each token and sequence ids, whose values are looked at in eager mode."""
    from torch._dynamo.testing import CompileCounterWithBackend

    generator = torch.Generator().manual_seed(5)
    x, weight = (torch.randn(n, 16, generator=generator) for n in (40, 300))
    targets = torch.randint(0, 300, (40,), generator=generator)
    rows, temperature, sequences = torch.arange(1, 40), torch.linspace(0.7, 1.3, 40), torch.arange(39) // 8

    def compute(x, weight):
        if name == "linear_log_prob":
            return torch.stack(linear_log_prob(x, weight, targets, temperature, rows))
        results = grouped_log_prob(x @ weight.t(), targets, temperature, rows)
        if name == "grouped_log_prob":
            return torch.stack(results)
        return grpo_token_loss(results.log_prob, torch.linspace(-1, 1, 5), sequence_ids=sequences)[0]

    counter, found = CompileCounterWithBackend("aot_eager"), []
    torch._dynamo.reset()
    for function in (compute, torch.compile(compute, fullgraph=True, backend=counter)):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        values = function(*leaves)
        values.square().sum().backward()
        found.append((values.detach(), *(leaf.grad for leaf in leaves)))
    assert counter.frame_count == 1
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 2, 63, 64, 65, 400, 1025, 5001])
def test_values_and_gradients_against_float64(implementation, dtype, vocabulary):
    logits, targets = random_case(23, vocabulary, dtype)
    temperature = torch.linspace(0.5, 1.5, 23)
    rows = torch.tensor([0, 3, 4, 11, 22])
    expected, leaf = exact(logits, targets, temperature, rows)
    logits.requires_grad_()
    got = torch.stack(grouped_log_prob(logits, targets, temperature, rows, backend=implementation))
    torch.testing.assert_close(got.double(), expected.detach(), rtol=3e-7, atol=1e-6)
    upstream = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    (got * upstream).sum().backward()
    (expected * upstream).sum().backward()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-6}
    torch.testing.assert_close(logits.grad.double(), leaf.grad, **tolerance)
    untouched = torch.ones(23, dtype=torch.bool)
    untouched[rows] = False
    assert (logits.grad[untouched] == 0).all()


@pytest.mark.parametrize("shift", [0.0, 300.0])
def test_error_is_no_larger_than_torch_fp32(native, shift):
    """Mean error over many rows: fp32 log_softmax as torch computes it is the bar, at any offset of the logits."""
    logits, targets = random_case(64, 20000, torch.float32, spread=3.0)
    logits += shift
    expected, _ = exact(logits, targets, 1.0)
    log_softmax = logits.log_softmax(-1)
    eager = torch.stack([log_softmax.gather(1, targets[:, None])[:, 0], -(log_softmax.exp() * log_softmax).sum(-1)])
    got = torch.stack(grouped_log_prob(logits, targets, backend=native)[:2])
    ours, theirs = ((x.double() - expected[:2].detach()).abs().mean(1) for x in (got, eager))
    assert (ours <= theirs + 1e-9).all(), (ours, theirs)


def test_prompt_rows_are_never_read(implementation):
    logits, targets = random_case(6, 130, torch.float32)
    rows = torch.tensor([1, 4])
    expected = grouped_log_prob(logits[rows].clone(), targets[rows], backend=implementation)
    poisoned, wild = logits.clone(), targets.clone()
    others = torch.tensor([0, 2, 3, 5])
    poisoned[others], wild[others] = math.nan, -100
    poisoned.requires_grad_()
    got = grouped_log_prob(poisoned, wild, rows=rows, backend=implementation)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    got.log_prob.sum().backward()
    assert (poisoned.grad[others] == 0).all() and poisoned.grad[rows].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_batch_or_the_threads(native, dtype):
    logits, targets = random_case(40, 4099, dtype)
    upstream = torch.randn(40, generator=torch.Generator().manual_seed(3))

    def run(x, t, g):
        x = x.clone().requires_grad_()
        out = grouped_log_prob(x, t, 0.9, backend=native)
        (out.log_prob * g + out.entropy).sum().backward()
        return [*(o.detach() for o in out), x.grad]

    whole = run(logits, targets, upstream)
    assert all(torch.equal(a, b) for a, b in zip(whole, run(logits, targets, upstream), strict=True))
    torch.set_num_threads(2)
    assert all(torch.equal(a, b) for a, b in zip(whole, run(logits, targets, upstream), strict=True))
    torch.set_num_threads(1)
    for part in (slice(0, 1), slice(7, 9), slice(39, 40)):
        alone = run(logits[part], targets[part], upstream[part])
        assert all(torch.equal(a, b[part]) for a, b in zip(alone, whole, strict=True))
    misaligned = torch.zeros(40, 4106, dtype=dtype)[:, 3:4102].copy_(logits)
    assert misaligned.stride() == (4106, 1)
    assert torch.equal(grouped_log_prob(misaligned, targets, 0.9, backend=native).log_prob, whole[0])


def test_every_instruction_set_agrees(native):
    logits, targets = random_case(9, 3001, torch.bfloat16)
    expected, leaf = exact(logits, targets, 1.0)
    expected.sum().backward()
    chosen = torch.ops.r1mega_kernels.instruction_set(-1)
    try:
        for number in range(chosen + 1):
            assert torch.ops.r1mega_kernels.instruction_set(number) == number
            x = logits.clone().requires_grad_()
            got = torch.stack(grouped_log_prob(x, targets, backend=native))
            torch.testing.assert_close(got.double(), expected.detach(), rtol=3e-7, atol=1e-6)
            got.sum().backward()
            torch.testing.assert_close(x.grad.double(), leaf.grad, rtol=2**-8, atol=1e-6)
    finally:
        torch.ops.r1mega_kernels.instruction_set(chosen)
    with pytest.raises(RuntimeError, match="no instruction set number 9"):
        torch.ops.r1mega_kernels.instruction_set(9)


@pytest.mark.parametrize("level", [-200.0, 200.0, -3e4])
def test_far_logits(implementation, level):
    """A global maximum that starts at 0 instead of -inf gives inf and NaN here."""
    logits, targets = random_case(5, 200, torch.float32, spread=1.0)
    expected, _ = exact(logits + level, targets, 1.0)
    got = torch.stack(grouped_log_prob(logits + level, targets, backend=implementation))
    torch.testing.assert_close(got.double(), expected.detach(), rtol=3e-7, atol=1e-6)


def test_masked_columns(implementation):
    logits, targets = random_case(5, 300, torch.float32)
    logits[:, 100:200] = -math.inf
    logits[2, :] = -math.inf
    logits[2, 250] = 3.0
    targets[:] = torch.tensor([0, 99, 250, 299, 150])  # the last is masked itself
    expected, _ = exact(logits, targets, 1.0)
    leaf = logits.clone().requires_grad_()
    got = torch.stack(grouped_log_prob(leaf, targets, backend=implementation))
    torch.testing.assert_close(got.double(), expected.detach(), rtol=3e-7, atol=1e-6)
    assert got[0, 4] == -math.inf and got[0, 2] == 0 and got[1, 2] == 0
    (got[:, :4] * torch.tensor([[1.0], [0.5], [0.1]])).sum().backward()
    assert leaf.grad.isfinite().all() and (leaf.grad[:, 100:200] == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 77, 1500, 3000])
def test_not_a_number_is_never_lost(implementation, bad, column):
    logits, targets = random_case(3, 3001, torch.float32)
    logits[1, column] = bad
    got = torch.stack(grouped_log_prob(logits, targets, backend=implementation))
    assert got[:, 1].isnan().all() and got[:, [0, 2]].isfinite().all()


def test_row_without_any_column_is_nan(implementation):
    got = grouped_log_prob(torch.full((1, 50), -math.inf), torch.tensor([3]), backend=implementation)
    assert got.log_prob.isnan().all()


def test_no_rows(implementation):
    logits, targets = random_case(4, 10, torch.float32)
    logits.requires_grad_()
    got = grouped_log_prob(logits, targets, rows=torch.empty(0, dtype=torch.int64), backend=implementation)
    assert got.log_prob.shape == (0,)
    got.log_prob.sum().backward()
    assert (logits.grad == 0).all()
    assert grouped_log_prob(logits[:0], targets[:0], backend=implementation).entropy.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"temperature": torch.tensor([1.0, 0.0, 1.0])}, "temperature must be > 0"),
        ({"temperature": float("nan")}, "temperature must be > 0"),
        ({"temperature": float("inf")}, "a finite number above 0, not inf"),
        ({"temperature": 1e-40}, "a finite number above 0, not 1e-40"),
        ({"temperature": torch.tensor([1.0, 1.0, float("nan")])}, "a finite number above 0, found nan"),
        ({"temperature": torch.tensor([1.0, 1.0, float("inf")])}, "a finite number above 0, found inf"),
        ({"temperature": torch.ones(2)}, "2 values for 3 rows"),
        ({"targets": torch.tensor([0, 5, 1])}, r"targets must be in \[0, 5\)"),
        ({"targets": torch.tensor([0, -1, 1])}, r"targets must be in \[0, 5\)"),
        ({"rows": torch.tensor([1, 1])}, "strictly increasing"),
        ({"rows": torch.tensor([1, 3])}, "strictly increasing"),
        ({"logits": torch.zeros(3, 0)}, "vocabulary is empty"),
        ({"targets": torch.zeros(3, dtype=torch.int64, device="meta")}, "targets is on meta, expected cpu"),
        ({"rows": torch.zeros(1, dtype=torch.int64, device="meta")}, "rows is on meta, expected cpu"),
        ({"backend": "fast"}, "'native' or 'reference'"),
    ],
)
def test_wrong_arguments(implementation, change, message):
    """By the compiled operators, which look at values themselves, as by the reference."""
    arguments = {"logits": torch.zeros(3, 5), "targets": torch.zeros(3, dtype=torch.int64), "backend": implementation}
    with pytest.raises(ValueError, match=message):
        grouped_log_prob(**arguments | change)


def test_targets_of_a_compiled_call_are_looked_at(native):
    """torch.compile cannot branch on values; the operator can."""
    arguments = (torch.ones(1), None, None, None, 0, 5, "", True, False, False)
    with pytest.raises(ValueError, match=r"targets must be in \[0, 5\), found -1 to 2"):
        torch.ops.r1mega_kernels.log_prob(torch.zeros(2, 5), torch.tensor([2, -1]), *arguments)


def test_wrong_dtype(native):
    with pytest.raises(TypeError, match="not torch.float16"):
        grouped_log_prob(torch.zeros(3, 5, dtype=torch.float16), torch.zeros(3, dtype=torch.int64))


def test_gradient_in_place_overwrites_the_logits_once(native):
    logits, targets = random_case(8, 70, torch.float32)
    rows = torch.tensor([2, 5])
    leaf = logits.clone().requires_grad_()
    grouped_log_prob(leaf, targets, rows=rows).log_prob.sum().backward()
    buffer = logits.clone()
    tracked = buffer.requires_grad_() * 1.0
    result = grouped_log_prob(tracked, targets, rows=rows, grad_in_place=True)
    (grad,) = torch.autograd.grad(result.log_prob.sum(), tracked, retain_graph=True)
    assert grad.data_ptr() == tracked.data_ptr() and torch.equal(grad, leaf.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(result.log_prob.sum(), tracked)


def test_logits_are_freed_with_their_results(implementation):
    """Without a backward pass, which would release them."""
    logits, targets = random_case(8, 70, torch.float32)
    leaf = logits.requires_grad_() * 1.0
    watched = weakref.ref(leaf)
    result = grouped_log_prob(leaf, targets, backend=implementation)
    del leaf, result
    gc.collect()
    assert watched() is None


def test_a_second_derivative_is_refused(implementation):
    logits, targets = random_case(8, 70, torch.float32)
    logits.requires_grad_()
    weight = torch.randn(70, 4, requires_grad=True)
    calls = {
        logits: grouped_log_prob(logits, targets, backend=implementation).log_prob.sum(),
        weight: linear_log_prob(torch.randn(8, 4), weight, targets, backend=implementation).log_prob.sum(),
    }
    policy = torch.zeros(3, requires_grad=True)
    calls[policy] = grpo_token_loss(policy, torch.ones(3), backend=implementation)[0]
    for leaf, value in calls.items():
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(value, leaf, create_graph=True)


def test_import_asks_for_no_gpu_and_no_compiler():
    """A process that has met the CUDA driver cannot fork workers that use it; the compiler takes a second to import."""
    program = (
        "import sys, torch\ndef fail(): raise SystemExit('asked')\ntorch.cuda.is_available = fail\n"
        "import r1mega_kernels as k\nprint(k.backend('cpu'))\nassert 'torch._dynamo' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_gradients_of_any_of_the_results(implementation):
    """Those that are not used bring no gradient of their own."""
    logits, targets = random_case(6, 40, torch.float32)
    expected, leaf = exact(logits, targets, 1.0)
    for chosen in ([0], [1], [2], [0, 2], [2, 1]):
        x = logits.clone().requires_grad_()
        results = grouped_log_prob(x, targets, backend=implementation)
        sum(results[k].square().sum() for k in chosen).backward()
        (grad,) = torch.autograd.grad(sum(expected[k].square().sum() for k in chosen), leaf, retain_graph=True)
        torch.testing.assert_close(x.grad.double(), grad, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_entropy(implementation, dtype):
    """The other results and their gradients have the same bits; the entropy is NaN, and so is what is asked of it."""
    logits, targets = random_case(7, 1500, dtype)
    found = []
    for entropy in (True, False):
        x = logits.clone().requires_grad_()
        log_prob, entropies, logsumexp = grouped_log_prob(x, targets, 0.7, entropy=entropy, backend=implementation)
        (log_prob.square().sum() + logsumexp.sum()).backward(retain_graph=True)
        found.append((log_prob.detach(), logsumexp.detach(), x.grad.clone()))
        assert bool(entropies.isnan().all()) is not entropy
        (of_entropy,) = torch.autograd.grad(entropies.sum(), x)
        assert bool(of_entropy.isnan().all()) is not entropy
    for with_it, without in zip(*found, strict=True):
        assert torch.equal(with_it, without)
    hidden, weight = torch.randn(5, 8), torch.randn(300, 8)
    parts = {entropy: linear_log_prob(hidden, weight, targets[:5] % 300, entropy=entropy, buffer_bytes=4 * 5 * 128,
                                      backend=implementation) for entropy in (True, False)}  # fmt: skip
    assert torch.equal(parts[True].log_prob, parts[False].log_prob) and parts[False].entropy.isnan().all()


def test_a_first_call_in_inference_mode_spoils_no_later_one(implementation):
    logits, targets = random_case(2, 5, torch.float32)
    with torch.inference_mode():
        grouped_log_prob(logits, targets, 0.123, backend=implementation)
    grouped_log_prob(logits.requires_grad_(), targets, 0.123, backend=implementation).log_prob.sum().backward()
    assert logits.grad.isfinite().all()


def test_a_first_call_under_another_default_device_spoils_no_later_one(native):
    logits, targets = random_case(3, 9, torch.float32)
    expected = (logits / 0.6237).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    with torch.device("meta"):
        first = grouped_log_prob(logits, targets, 0.6237, backend=native).log_prob
    later = grouped_log_prob(logits, targets, 0.6237, backend=native).log_prob
    torch.testing.assert_close(first, expected)
    assert torch.equal(later, first)


def test_formulas_by_finite_differences():
    logits, targets = random_case(4, 9, torch.float64, spread=1.0)
    rows = torch.tensor([0, 2, 3])
    logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: tuple(grouped_log_prob(x, targets, 0.8, rows, backend="reference")), (logits,)
    )


def test_operator_passes_torchs_own_checks(native):
    """Schema, fake tensors, autograd registration and aot dispatch, by torch.library.opcheck."""
    logits, targets = random_case(6, 40, torch.float32)
    rows = torch.tensor([1, 2, 5])
    for chosen in (None, rows):
        arguments = (
            logits.clone().requires_grad_(),
            targets,
            torch.ones(1),
            chosen,
            None,
            None,
            0,
            40,
            "",
            True,
            False,
            False,
        )
        torch.library.opcheck(torch.ops.r1mega_kernels.log_prob.default, arguments)


def test_backend_is_named(native):
    assert r1mega_kernels.backend("cpu") in ("cpu-avx512", "cpu-avx2", "cpu-generic")
