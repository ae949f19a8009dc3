"""linear_log_prob against float64 hidden @ weight.T: values, gradients, blocks, main_grad, memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from r1mega_kernels import grouped_log_prob, linear_log_prob
from r1mega_kernels.linear import block_shape, output_layer
from r1mega_kernels.log_prob import backward_into, narrow_rows, stats_into
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
    assert largest <= 1 << 20


def test_blocks_fit_the_buffer_and_are_square():
    """Of H200's traffic beside the logits: 8 bytes of fp32 sum a token and hidden unit for each block of the vocabulary,
    and the other way round."""
    shapes = {
        shape: block_shape(*shape, 4, 128 << 20)
        for shape in ((65536, 129280), (8192, 129280), (100, 129280), (65536, 400))
    }
    assert shapes == {
        (65536, 129280): (5760, 5760), (8192, 129280): (5760, 5760), (100, 129280): (100, 129280), (65536, 400): (65536, 400)
    }  # fmt: skip
    assert block_shape(65536, 2000, 4, 128 << 20) == (16768, 2000) and block_shape(900, 700, 4, 1) == (128, 128)
    assert all(rows * columns * 4 <= 128 << 20 for rows, columns in shapes.values())

    def traffic(rows, columns):
        return 8 * 7168 * 65536 * 129280 * (1 / rows + 1 / columns)

    assert traffic(5760, 5760) < 0.4 * traffic(65536, 1024)  # one block of tokens, of the same size in bf16


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 2e-6), (torch.float16, 5e-6)])
def test_logits_are_not_rounded(implementation, dtype, limit):
    """At logits of 40 and more: values and gradients against float64 of the same factors. Through bf16 logits the
    log-probs are 0.01 off."""
    x, weight, targets = random_case(tokens=64, hidden=256, vocabulary=4000)
    x, weight = x.to(dtype), (weight * (40 / (x @ weight.t()).abs().max())).to(dtype)
    upstream = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    expected, grad_x, grad_w = float64_gradients(x, weight, targets, 1.0, torch.arange(64), upstream)
    x.requires_grad_(), weight.requires_grad_()
    weight.main_grad = torch.zeros(weight.shape)
    got = torch.stack(linear_log_prob(x, weight, targets, buffer_bytes=1 << 16, backend=implementation))
    assert (got.double() - expected).abs().mean() < limit
    (got * upstream).sum().backward()
    assert (weight.main_grad.double() - grad_w).norm() < 1e-5 * grad_w.norm()
    assert (x.grad.double() - grad_x).norm() < 2e-3 * grad_x.norm()  # rounded to its dtype, once


def test_softcap(implementation):
    x, weight, targets = random_case(tokens=40)
    leaf_x, leaf_w = x.double().requires_grad_(), weight.double().requires_grad_()
    logits = 5 * torch.tanh(leaf_x @ leaf_w.t() / 5)
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected.sum().backward()
    x.requires_grad_(), weight.requires_grad_()
    got = linear_log_prob(x, weight, targets, softcap=5.0, buffer_bytes=1, backend=implementation).log_prob
    got.sum().backward()
    torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=4e-6)
    torch.testing.assert_close(x.grad.double(), leaf_x.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), leaf_w.grad, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="softcap must be"):
        linear_log_prob(x, weight, targets, softcap=0.0)


@pytest.mark.parametrize("fused", [False, True])
def test_tied_embedding(implementation, fused):
    """The weight embeds the tokens too; fused: with Megatron's main_grad, and its hook as it stands in
    core/distributed/distributed_data_parallel.py."""
    _, weight, targets = random_case()
    leaf = weight.double().requires_grad_()
    states = leaf[targets.roll(1)]
    (states @ leaf.t()).log_softmax(-1).gather(1, targets[:, None]).sum().backward()
    weight.requires_grad_()
    if fused:
        weight.main_grad, weight.grad_added_to_main_grad, weight.zero_out_wgrad = torch.zeros_like(weight), False, True
    linear_log_prob(weight[targets.roll(1)], weight, targets, backend=implementation).log_prob.sum().backward()
    total = weight.grad + weight.main_grad if fused else weight.grad
    torch.testing.assert_close(total.double(), leaf.grad, rtol=1e-4, atol=1e-5)


def test_megatrons_hook_sees_the_gradient_that_autograd_was_given(native):
    """None at the node of the weight would leave it to autograd in which thread the hook runs."""
    x, weight, targets = random_case()
    weight.requires_grad_()
    weight.main_grad, weight.grad_added_to_main_grad, seen, given = torch.zeros_like(weight), False, [], []

    def hook(*_):
        seen.append((weight.grad_added_to_main_grad, weight.grad.shape, bool(weight.grad.any())))
        weight.grad = None

    node = weight.expand_as(weight).grad_fn.next_functions[0][0]
    node.register_prehook(lambda gradients: given.extend(gradients))
    node.register_hook(hook)
    for _ in range(2):
        linear_log_prob(x, weight, targets).log_prob.sum().backward()
    assert seen == [(True, weight.shape, False)] * 2
    assert [gradient is not None and gradient.shape for gradient in given] == [weight.shape] * 2


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


class Allocated(TorchDispatchMode):
    """The bytes of the largest storage that an operator made."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.untyped_storage()._cdata not in given:
            self.largest = max(self.largest, made.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_where_products_widen_the_gradient_of_logits_is_narrow_from_the_first(monkeypatch, dtype):
    """As on a GPU: in the place of the logits. No copy of their size is made, in fp32 or in the factors' dtype."""
    monkeypatch.setattr("r1mega_kernels.linear.widens", lambda x: True)
    monkeypatch.setattr("r1mega_kernels.linear.backward_into", lambda grad, logits, *rest: grad.fill_(0.25))
    x, weight = (torch.ones(n, 8, dtype=dtype) for n in (32, 1024))
    targets, stats = torch.zeros(32, dtype=torch.int64), torch.zeros(32, 4)
    head, states, tokens = output_layer(x, weight, targets, 1.0, *[None] * 6, True, False, "reference")
    buffer = torch.zeros(48 * 1024)
    with Allocated() as made:
        logits = buffer[: 32 * 1024].view(32, 1024)
        grad = head.gradient_of(logits, tokens, None, 0, stats, stats[:, 0], torch.zeros(3, 32))
        product = grad.t() @ states
    assert (grad.dtype, grad.shape, grad.stride()) == (dtype, (32, 1024), (2048, 1))
    assert grad.data_ptr() == buffer.data_ptr() and torch.equal(product, torch.full((1024, 8), 8.0, dtype=dtype))
    assert made.largest == 1024 * 8 * 2, "the product alone"


def test_narrow_gradients_are_the_rounded_ones():
    """What a GPU does, by the reference on a CPU: the first half of each row takes the gradient, rounded once."""
    logits, stats = torch.randn(5, 40), torch.empty(5, 4)
    targets, inverse, upstream = torch.arange(5), torch.ones(1), torch.randn(3, 5)
    stats_into(stats, logits, targets, inverse, None, (None, None), 0, 40, True, True)
    arguments = (targets, inverse, None, (None, None), None, 0, stats, stats[:, 3], upstream, True)
    wide, place = torch.empty(5, 40), logits.clone()
    backward_into(wide, logits, *arguments)
    narrow = narrow_rows(place, torch.bfloat16)
    backward_into(narrow, place, *arguments)
    assert torch.equal(narrow, wide.bfloat16()) and narrow.data_ptr() == place.data_ptr()
