"""linear_grpo_loss against linear_log_prob followed by grpo_token_loss: loss, gradients, metrics, products, memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from r1mega_kernels import grpo_token_loss, linear_grpo_loss, linear_log_prob
from tests.unit.kernels.test_linear import random_case

ROWS = torch.arange(7, 150)
GENERATOR = torch.Generator().manual_seed(5)
ADVANTAGES, MOVED = (torch.randn(len(ROWS), generator=GENERATOR) for _ in range(2))


def token_loss(old, backend):
    """Of a chunk, as of all rows: clipped ratios, KL, weights; and a bonus for entropy."""

    def of(scores, part):
        loss, metrics = grpo_token_loss(
            scores.log_prob, ADVANTAGES[part], old[part], reference_log_probs=old[part] - 0.1,
            sampler_log_probs=old[part], weights=torch.full_like(ADVANTAGES, 1 / len(ROWS))[part], kl_coefficient=0.05,
            importance_cap=2.0, backend=backend,
        )  # fmt: skip
        return loss - 1e-3 * scores.entropy.sum(), metrics

    return of


def leaves(x, weight, fused):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    if fused:
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(weight.shape, dtype=torch.float32), False
    return x, weight


@pytest.mark.parametrize("chunk_tokens", [40, 4096])
@pytest.mark.parametrize(("dtype", "fused"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)])
def test_equals_the_two_step_way(implementation, chunk_tokens, dtype, fused):
    x, weight, targets = random_case(dtype=dtype)
    common = {"temperature": 0.8, "rows": ROWS, "softcap": 9.0, "backend": implementation}
    old = linear_log_prob(x, weight, targets, **common).log_prob + 0.2 * MOVED
    of = token_loss(old, implementation)
    results = []
    for one_pass in (False, True):
        leaf_x, leaf_w = leaves(x, weight, fused)
        if one_pass:
            loss, found = linear_grpo_loss(leaf_x, leaf_w, targets, of, **common, chunk_tokens=chunk_tokens)
        else:
            scores = linear_log_prob(leaf_x, leaf_w, targets, **common)
            loss, metrics = of(scores, slice(0, len(ROWS)))
            found = [metrics]
        if fused:
            assert (leaf_w.main_grad == 0).all()  # nothing is added before the backward pass
        (loss * 1.7).backward()
        assert not fused or (leaf_w.grad == 0).all()
        sums = [sum(float(getattr(m, name)) for m in found) for name in ("num_tokens", "clipped", "kl", "mismatch_sum")]
        results.append((loss.detach(), leaf_x.grad, leaf_w.main_grad if fused else leaf_w.grad, torch.tensor(sums)))
    assert results[0][3][1] > 0  # some are clipped
    for two_step, one_pass in zip(*results, strict=True):
        limit = (
            1e-3 if one_pass.dtype == torch.bfloat16 else 1e-6
        )  # the hidden states' gradient is rounded to their dtype
        assert (one_pass.double() - two_step.double()).norm() <= limit * two_step.double().norm() + 2e-8


def test_without_gradients(implementation):
    """Only the loss is computed: one product; a leaf that needs no gradient gets none."""
    x, weight, targets = random_case()
    of = token_loss(linear_log_prob(x, weight, targets, rows=ROWS).log_prob, implementation)
    expected, _ = of(linear_log_prob(x, weight, targets, rows=ROWS, backend=implementation), slice(0, len(ROWS)))
    loss, _ = linear_grpo_loss(x, weight, targets, of, rows=ROWS, backend=implementation)
    assert not loss.requires_grad and torch.allclose(loss, expected, rtol=1e-6)
    x.requires_grad_()
    linear_grpo_loss(x, weight, targets, of, rows=ROWS, backend=implementation)[0].backward()
    assert weight.grad is None and x.grad[7:].abs().sum() > 0 and (x.grad[:7] == 0).all()


def test_no_rows(implementation):
    x, weight, targets = random_case()
    x.requires_grad_(), weight.requires_grad_()

    def of(scores, part):
        return scores.log_prob.sum(), len(scores.log_prob)

    loss, found = linear_grpo_loss(x, weight, targets, of, rows=ROWS[:0], backend=implementation)
    loss.backward()
    assert found == [0] and float(loss) == 0 and (x.grad == 0).all() and (weight.grad == 0).all()


class Products(TorchDispatchMode):
    """Adds up the floating-point operations of matrix products."""

    operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            first, second = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.operations += 2 * first.numel() * second.shape[1]
        return function(*args, **(kwargs or {}))


def test_three_matrix_products(native):
    """Where the two-step way takes four."""
    x, weight, targets = random_case()
    of = token_loss(torch.zeros(len(ROWS)), native)
    leaf_x, leaf_w = leaves(x, weight, False)
    with Products() as one:
        linear_grpo_loss(leaf_x, leaf_w, targets, of, rows=ROWS)[0].backward()
    with Products() as two:
        of(linear_log_prob(leaf_x, leaf_w, targets, rows=ROWS), slice(0, len(ROWS)))[0].backward()
    product = 2 * len(ROWS) * x.shape[1] * weight.shape[0]
    assert (one.operations, two.operations) == (3 * product, 4 * product)


def test_wrong_arguments():
    x, weight, targets = random_case()
    with pytest.raises(ValueError, match="chunk_tokens must be"):
        linear_grpo_loss(x, weight, targets, token_loss(x, None), chunk_tokens=0)
    x.requires_grad_()
    loss, _ = linear_grpo_loss(x, weight, targets, lambda scores, part: (scores.log_prob.sum(), None))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)
