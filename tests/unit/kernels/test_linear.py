"""linear_log_prob against float64 hidden @ weight.T: values, gradients, blocks, main_grad, memory."""

from __future__ import annotations

import pytest
import torch

from r1mega_kernels import grouped_log_prob, linear_log_prob
from r1mega_kernels.linear import block_size
from tests.unit.kernels.test_log_prob import exact


def random_case(tokens=150, hidden=24, vocabulary=700, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, hidden, generator=generator) * 0.6).to(dtype)
    return x, weight, torch.randint(0, vocabulary, (tokens,), generator=generator)


def float64_gradients(x, weight, targets, temperature, rows, upstream):
    leaf_x, leaf_w = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    scaled = (leaf_x @ leaf_w.t() / torch.as_tensor(temperature, dtype=torch.float64).reshape(-1, 1))[rows]
    log_probs = scaled.log_softmax(-1)
    chosen = log_probs.gather(1, targets[rows][:, None])[:, 0]
    outputs = torch.stack([chosen, -(log_probs.exp() * log_probs).sum(-1), scaled.logsumexp(-1)])
    (outputs * upstream).sum().backward()
    return outputs.detach(), leaf_x.grad, leaf_w.grad


@pytest.mark.parametrize("buffer_bytes", [1, 1 << 30])  # blocks of 128 rows and columns; all at once
@pytest.mark.parametrize("per_token", [False, True])
def test_values_and_gradients_against_float64(implementation, buffer_bytes, per_token):
    x, weight, targets = random_case()
    temperature = torch.linspace(0.7, 1.3, 150) if per_token else 0.8
    rows = torch.arange(1, 150)
    upstream = torch.randn(3, 149, generator=torch.Generator().manual_seed(4))
    expected, grad_x, grad_w = float64_gradients(x, weight, targets, temperature, rows, upstream)
    x.requires_grad_(), weight.requires_grad_()
    got = torch.stack(
        linear_log_prob(x, weight, targets, temperature, rows, buffer_bytes=buffer_bytes, backend=implementation)
    )
    torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=4e-6)
    (got * upstream).sum().backward()
    torch.testing.assert_close(x.grad.double(), grad_x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), grad_w, rtol=1e-4, atol=1e-5)


def test_bf16_weight_gradient_is_added_once_in_fp32(native):
    """Against autograd through bf16 logits, whose dW is rounded to bf16: the fp32 sum is closer to float64."""
    x, weight, targets = random_case(dtype=torch.bfloat16)
    _, _, exact_w = float64_gradients(x, weight, targets, 1.0, torch.arange(150), torch.tensor([[1.0], [0.0], [0.0]]))
    weight.requires_grad_()
    weight.main_grad = torch.ones(weight.shape, dtype=torch.float32)
    weight.grad_added_to_main_grad = False
    for _ in range(2):  # two microbatches
        linear_log_prob(x, weight, targets, buffer_bytes=1).log_prob.sum().backward()
    assert weight.grad_added_to_main_grad and (weight.grad == 0).all()
    ours = (weight.main_grad - 1).double() / 2
    plain = weight.detach().clone().requires_grad_()
    grouped_log_prob(x @ plain.t(), targets).log_prob.sum().backward()
    error, eager_error = ((g.double() - exact_w).norm() / exact_w.norm() for g in (ours, plain.grad))
    assert error < eager_error and error < 4e-3


def test_main_grad_without_megatron_returns_no_gradient(native):
    x, weight, targets = random_case()
    expected = weight.clone().requires_grad_()
    linear_log_prob(x, expected, targets).log_prob.sum().backward()
    weight.requires_grad_()
    weight.main_grad = torch.zeros_like(weight)
    linear_log_prob(x, weight, targets).log_prob.sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad, expected.grad)
    weight.main_grad = weight.main_grad.bfloat16()
    with pytest.raises(TypeError, match="main_grad is torch.bfloat16"):
        linear_log_prob(x, weight, targets).log_prob.sum().backward()


def test_frozen_weight_and_no_rows(native):
    x, weight, targets = random_case()
    x.requires_grad_()
    linear_log_prob(x, weight, targets, rows=torch.empty(0, dtype=torch.int64)).log_prob.sum().backward()
    assert weight.grad is None and (x.grad == 0).all()


def test_agrees_with_the_logits_path(native):
    x, weight, targets = random_case()
    expected, _ = exact(x.double() @ weight.double().t(), targets, 1.0)
    logits_path = torch.stack(grouped_log_prob(x @ weight.t(), targets))
    hidden_path = torch.stack(linear_log_prob(x, weight, targets))
    torch.testing.assert_close(hidden_path, logits_path, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(hidden_path.double(), expected.detach(), rtol=2e-6, atol=4e-6)


def test_buffer_never_holds_all_logits(native):
    """No tensor larger than the buffer, the weight or the hidden states is allocated, forward or backward."""
    x, weight, targets = random_case(tokens=2048, hidden=16, vocabulary=4096)
    x.requires_grad_(), weight.requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_log_prob(x, weight, targets, buffer_bytes=1 << 20).log_prob.sum().backward()
    largest = max(
        abs(event.nbytes()) for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"
    )
    assert largest <= 128 * 4096 * 4 and largest < 2048 * 4096 * 4 / 10
    assert block_size(4096, 4, 1 << 30) == 65536 and block_size(129280, 2, 1) == 128


@pytest.mark.parametrize(
    ("hidden", "weight", "error"),
    [
        (torch.zeros(3, 4), torch.zeros(5, 6), "expected hidden"),
        (torch.zeros(3, 4), torch.zeros(5, 4).bfloat16(), "weight is torch.bfloat16"),
        (torch.zeros(3, 4), torch.zeros(0, 4), "vocabulary is empty"),
    ],
)
def test_wrong_arguments(hidden, weight, error):
    with pytest.raises((ValueError, TypeError), match=error):
        linear_log_prob(hidden, weight, torch.zeros(3, dtype=torch.int64))
