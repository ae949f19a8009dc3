"""linear_grpo_loss against linear_log_prob followed by grpo_token_loss: loss, gradients, metrics, products, memory."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from r1mega_kernels import grpo_token_loss, linear_grpo_loss, linear_log_prob
from r1mega_kernels.linear import OutputLayer
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


@pytest.mark.parametrize("frozen", ["", "hidden", "weight"])
@pytest.mark.parametrize("temperature", [0.8, torch.linspace(0.7, 1.3, 150)])
def test_the_short_way_of_one_block_has_the_same_bits(native, monkeypatch, frozen, temperature):
    """Of few lines for a call's time; what has softcap, ranks, kept ids, 16 bits, autocast takes the other."""
    x, weight, targets = random_case()
    old, ways, taken = linear_log_prob(x, weight, targets, temperature, ROWS).log_prob + 0.2 * MOVED, [], []
    is_short = OutputLayer.is_short

    def asked(short):
        def of(head, tokens):
            taken.append(is_short(head, tokens))
            return short and taken[-1]

        return of

    for short in (True, False):
        monkeypatch.setattr(OutputLayer, "is_short", asked(short))
        leaf_x, leaf_w = x.clone().requires_grad_(frozen != "hidden"), weight.clone().requires_grad_(frozen != "weight")
        common = (leaf_x, leaf_w, targets)
        one_pass, _ = linear_grpo_loss(*common, token_loss(old, "native"), temperature, ROWS)
        scores = linear_log_prob(*common, temperature, ROWS)
        inputs = [leaf for leaf in (leaf_x, leaf_w) if leaf.requires_grad]
        outputs = (one_pass, (scores.log_prob * MOVED).sum() + scores.entropy.sum())
        ways.append([*outputs, *scores, *(g for output in outputs for g in torch.autograd.grad(output, inputs))])
    torch.testing.assert_close(*ways, rtol=0, atol=0)
    assert taken == [True] * 6, "forward of both functions and the second's backward pass"
    taken.clear()
    with torch.autocast("cpu", torch.bfloat16):
        linear_log_prob(x, weight, targets), linear_log_prob(x, weight, targets, softcap=9.0)
    assert taken == [False, False]


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


class Zeroed(TorchDispatchMode):
    """Counts tensors that are made of zeros."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.count += "zero" in function.overloadpacket.__name__ and made.dim() == 2 and made.shape[0] > 3
        return made


@pytest.mark.parametrize("one", [True, False])
def test_a_sum_of_one_product_is_that_product(native, one):
    """No gradient is cleared first and added to, where all tokens and columns are in one block or chunk."""
    x, weight, targets = random_case()
    leaf_x, leaf_w = leaves(x, weight, False)
    with Zeroed() as zeroed:
        linear_log_prob(leaf_x, leaf_w, targets, buffer_bytes=1 << 27 if one else 1).log_prob.sum().backward()
        whole = len(targets) if one else len(targets) // 2
        linear_grpo_loss(leaf_x, leaf_w, targets, lambda s, _: (s.log_prob.sum(), 0), chunk_tokens=whole)[0].backward()
    assert zeroed.count == (0 if one else 3), "in chunks the weight's gradient is still begun by a product"


def test_of_a_converted_weight_one_piece_is_held_at_a_time(native, monkeypatch):
    """On a CPU, which takes 16 bits only after they are widened."""
    monkeypatch.setattr("r1mega_kernels.linear_loss._WIDENED_COLUMNS", 128)
    x, weight, targets = random_case(dtype=torch.bfloat16)
    pieces, held, factor = [], [], OutputLayer.factor

    def watched(head, of):
        if of.shape[0] == len(targets) // 2:  # a chunk's hidden states
            return factor(head, of)
        held.append(sum(piece() is not None for piece in pieces))
        widened = factor(head, of)
        pieces.append(weakref.ref(widened))
        return widened

    monkeypatch.setattr(OutputLayer, "factor", watched)
    leaf_x, leaf_w = leaves(x, weight, False)
    linear_grpo_loss(leaf_x, leaf_w, targets, lambda s, _: (s.log_prob.sum(), 0), chunk_tokens=len(targets) // 2)
    assert held == [0] * (2 * 2 * 6)  # 700 columns, for the logits and for the gradient of each chunk


@pytest.mark.parametrize("chunk_tokens", [2, 4])
def test_a_loss_on_another_device_is_a_number(chunk_tokens):
    """Such as the zero of a chunk that has nothing to learn."""
    x, weight, targets = (torch.empty(*shape, device="meta") for shape in ((4, 8), (9, 8), (4,)))

    def of(scores, part):
        return (torch.zeros(()) if part.stop == 4 else scores.log_prob.sum()), None

    loss, _ = linear_grpo_loss(x, weight, targets.long(), of, chunk_tokens=chunk_tokens)
    assert loss.device.type == "meta" and loss.dtype == torch.float32


def sequence_loss(log_probs, old, advantages, lengths):
    """GSPO, eq. 5 and 7: the clipped surrogate of each sequence's length-normalised ratio, times its advantage."""
    total = 0.0
    for ours, theirs, advantage in zip(log_probs.split(lengths), old.split(lengths), advantages, strict=True):
        ratio = (ours - theirs).mean().exp()
        total = total - torch.minimum(ratio * advantage, ratio.clamp(0.95, 1.05) * advantage)
    return total


@pytest.mark.parametrize("chunk_tokens", [1, 30, 1000])
def test_ratios_of_sequences_in_one_pass(implementation, chunk_tokens):
    """Chunks of whole sequences, of which one is longer than a chunk may be; against float64 of all at once."""
    generator = torch.Generator().manual_seed(4)
    lengths = [7, 12, 45, 1, 9, 16]
    x, weight = (torch.randn(n, 8, generator=generator) for n in (sum(lengths), 150))
    targets = torch.randint(0, 150, (sum(lengths),), generator=generator)
    leaf_x, leaf_w = x.double().requires_grad_(), weight.double().requires_grad_()
    exact = (leaf_x @ leaf_w.t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    old = (exact + 0.05 * torch.randn(sum(lengths), generator=generator)).detach()
    advantages = torch.randn(len(lengths), generator=generator)
    expected = sequence_loss(exact, old, advantages, lengths)
    expected.backward()
    starts = [sum(lengths[:k]) for k in range(len(lengths) + 1)]

    def token_loss(scores, part):
        first, last = starts.index(part.start), starts.index(part.stop)
        loss = sequence_loss(scores.log_prob, old[part].float(), advantages[first:last], lengths[first:last])
        return loss, part.stop - part.start

    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    loss, sizes = linear_grpo_loss(
        *leaves, targets, token_loss, chunk_tokens=chunk_tokens, sequence_offsets=starts, backend=implementation
    )
    loss.backward()
    assert sizes == {1: lengths, 30: [19, 45, 26], 1000: [90]}[chunk_tokens]
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    for ours, exact_leaf in zip(leaves, (leaf_x, leaf_w), strict=True):
        torch.testing.assert_close(ours.grad.double(), exact_leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.heavy
def test_compiled_with_a_break_it_computes_the_same(native):
    """torch.compile does not take the inner gradient of a caller's function into its graph: it leaves one out."""
    generator = torch.Generator().manual_seed(5)
    x, weight = (torch.randn(n, 8, generator=generator) for n in (20, 50))
    targets = torch.randint(0, 50, (20,), generator=generator)

    def compute(x, weight):
        return 2 * linear_grpo_loss(x, weight, targets, lambda scores, part: (scores.log_prob.square().sum(), None))[0]

    found = []
    torch._dynamo.reset()
    for function in (compute, torch.compile(compute, backend="aot_eager")):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        function(*leaves).backward()
        found.append([leaf.grad for leaf in leaves])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_wrong_arguments():
    x, weight, targets = random_case()
    with pytest.raises(ValueError, match="chunk_tokens must be"):
        linear_grpo_loss(x, weight, targets, token_loss(x, None), chunk_tokens=0)
    with pytest.raises(ValueError, match="rows must be a contiguous vector"):
        linear_grpo_loss(x, weight, targets, token_loss(x, None), rows=torch.tensor(1))
    with pytest.raises(ValueError, match=r"expected hidden \[T, H\]"):
        linear_grpo_loss(torch.tensor(1.0), weight, targets, token_loss(x, None))
    for offsets in ([], [0, 3], [1, len(x)], [0, 5, 3, len(x)]):
        with pytest.raises(ValueError, match="sequence_offsets must rise from 0"):
            linear_grpo_loss(x, weight, targets, token_loss(x, None), sequence_offsets=offsets)
    x.requires_grad_()
    loss, _ = linear_grpo_loss(x, weight, targets, lambda scores, part: (scores.log_prob.sum(), None))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)
