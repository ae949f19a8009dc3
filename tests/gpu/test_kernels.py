"""The CUDA kernels on a GPU against float64 on the CPU: the claims that the CPU's tests check."""

from __future__ import annotations

import pytest
import torch

import r1mega_kernels
from r1mega_kernels import group_advantage, grouped_log_prob, grpo_token_loss, linear_log_prob
from tests.unit.kernels.test_log_prob import exact, random_case
from tests.unit.kernels.test_loss import random_tokens

pytestmark = pytest.mark.gpu


def test_the_cuda_library_is_in_use():
    assert r1mega_kernels.backend("cuda") == "cuda", "run `python kernels/build.py --cuda`"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 400, 1003, 16160, 129280, 151936])
def test_log_prob_and_gradient(dtype, vocabulary):
    logits, targets = random_case(9, vocabulary, dtype)
    rows, temperature = torch.tensor([0, 2, 3, 8]), torch.linspace(0.5, 1.5, 9)
    upstream = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    expected, leaf = exact(logits, targets, temperature, rows)
    (expected * upstream).sum().backward()
    on_gpu = logits.cuda().requires_grad_()
    got = torch.stack(grouped_log_prob(on_gpu, targets.cuda(), temperature.cuda(), rows.cuda()))
    torch.testing.assert_close(got.double().cpu(), expected.detach(), rtol=1e-6, atol=4e-6)
    (got * upstream.cuda()).sum().backward()
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-6}
    torch.testing.assert_close(on_gpu.grad.double().cpu(), leaf.grad, **tolerance)


def test_error_is_no_larger_than_torch_fp32():
    logits, targets = random_case(64, 129280, torch.float32, spread=3.0)
    expected, _ = exact(logits, targets, 1.0)
    log_softmax = logits.cuda().log_softmax(-1)
    chosen = log_softmax.gather(1, targets.cuda()[:, None])[:, 0]
    eager = torch.stack([chosen, -(log_softmax.exp() * log_softmax).sum(-1)])
    got = torch.stack(grouped_log_prob(logits.cuda(), targets.cuda())[:2])
    ours, theirs = ((x.double().cpu() - expected[:2].detach()).abs().mean(1) for x in (got, eager))
    assert (ours <= theirs + 1e-9).all(), (ours, theirs)


def test_types_without_a_kernel_are_refused():
    """Those of logits and their gradient; the Python side asks for none of them."""
    targets, one = torch.zeros(2, dtype=torch.int64, device="cuda"), torch.ones(1, device="cuda")
    stats, grads = torch.zeros(2, 4, device="cuda"), torch.ones(3, 2, device="cuda")
    half, bf16, fp32 = (torch.zeros(2, 8, dtype=t, device="cuda") for t in (torch.half, torch.bfloat16, torch.float32))
    op, rows = torch.ops.r1mega_kernels, (targets, False, 0)
    for logits, grad in ((bf16, fp32), (bf16, half), (half, half), (half, fp32)):
        with pytest.raises(RuntimeError, match="bfloat16 logits a gradient of bfloat16"):
            op.log_prob_backward(logits, targets, one, *rows, stats, grads[1].contiguous(), grads, grad)
    with pytest.raises(RuntimeError, match="reads logits of float32 or bfloat16"):
        op.log_prob_stats(half, targets, one, *rows, half.shape[1], True, stats)


@pytest.mark.parametrize("vocabulary", [16160, 16163])  # rows on and off 16-byte boundaries
def test_bits_do_not_depend_on_the_batch(vocabulary):
    logits, targets = (t.cuda() for t in random_case(700, vocabulary, torch.bfloat16))

    def run(x, t):
        x = x.clone().requires_grad_()
        out = grouped_log_prob(x, t)
        (out.log_prob + 0.1 * out.entropy).sum().backward()
        return [*(o.detach() for o in out), x.grad]

    whole = run(logits, targets)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(logits, targets), whole, strict=True))
    for part in (slice(0, 1), slice(699, 700), slice(100, 357)):
        assert all(torch.equal(a, b[part]) for a, b in zip(run(logits[part], targets[part]), whole, strict=True))


def test_extremes():
    inf = float("inf")
    logits, targets = random_case(5, 2100, torch.float32)
    logits[0] -= 200
    logits[1, :2050], targets[1] = -inf, 2099
    logits[2, 700], logits[3, 5] = float("nan"), inf
    logits[4] = -inf
    got = torch.stack(grouped_log_prob(logits.cuda(), targets.cuda())).cpu()
    expected, _ = exact(logits[:2], targets[:2], 1.0)
    torch.testing.assert_close(got[:, :2].double(), expected.detach(), rtol=1e-6, atol=4e-6)
    assert got[:, 2:4].isnan().all() and got[0, 4].isnan()
    outside = grouped_log_prob(torch.zeros(1, 8, device="cuda"), torch.tensor([8], device="cuda"))
    assert outside.log_prob.isnan().all()


def test_linear_agrees_with_float64_and_keeps_its_memory():
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(2048, 256, generator=generator).bfloat16()
    weight = (torch.randn(32000, 256, generator=generator) / 16).bfloat16()
    targets = torch.randint(0, 32000, (2048,), generator=generator)
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    expected = (h @ w.t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected.sum().backward()
    gh, gw = hidden.cuda().requires_grad_(), weight.cuda().requires_grad_()
    gw.main_grad = torch.zeros(gw.shape, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = linear_log_prob(gh, gw, targets.cuda(), buffer_bytes=8 << 20)
    got.log_prob.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2048 * 32000 * 2 / 2
    torch.testing.assert_close(got.log_prob.detach().double().cpu(), expected.detach(), rtol=0, atol=2e-2)
    for ours, theirs in ((gh.grad, h.grad), (gw.main_grad, w.grad)):
        assert (ours.double().cpu() - theirs).norm() / theirs.norm() < 1e-2


@pytest.mark.parametrize("further", [{"dual_clip": 3.0}, {"surrogate": "cispo"}, {"surrogate": "sapo"}])
@pytest.mark.parametrize("count", [1, 2049, 100_000])
def test_token_loss(count, further):
    policy, old, reference, sampler, advantages, weights = random_tokens(count)
    options = {"clip_low": 0.2, "clip_high": 0.28, "kl_coefficient": 0.1, "importance_cap": 1.2} | further
    options["kl_bias_correction"] = "surrogate" in further
    results = []
    for move, backend in ((lambda t: t.float().cuda(), None), (lambda t: t.float().double(), "reference")):
        leaf = move(policy).requires_grad_()
        loss, metrics = grpo_token_loss(
            leaf, move(advantages), move(old), reference_log_probs=move(reference), sampler_log_probs=move(sampler),
            weights=move(weights), backend=backend, **options,
        )  # fmt: skip
        loss.backward()
        sums = torch.stack([metrics.num_tokens, metrics.clipped, metrics.kl, metrics.truncated, metrics.ratio_sum])
        results.append((loss.detach().double().cpu(), sums.cpu(), leaf.grad.double().cpu()))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_group_advantage(scale):
    offsets = torch.tensor([0, 1, 1, 17, 50, 52])
    rewards = torch.randint(0, 4, (52,), generator=torch.Generator().manual_seed(2)).double() / 3
    mask = torch.rand(52, generator=torch.Generator().manual_seed(3)) > 0.2
    expected = group_advantage(rewards, offsets, mask, scale=scale, backend="reference")
    got = group_advantage(rewards.cuda(), offsets.cuda(), mask.cuda(), scale=scale)
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-6, atol=1e-7)
