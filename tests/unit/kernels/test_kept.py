"""Log-probs renormalised over kept ids, against float64 log_softmax of masked logits: values, gradients, finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from r1mega_kernels import KeptTokens, grouped_log_prob, linear_grpo_loss, linear_log_prob
from tests.unit.kernels.test_log_prob import random_case


def lists_of(keeps: torch.Tensor) -> KeptTokens:
    """The lists of a mask [T, V]; a row that is False throughout gives an empty one."""
    offsets = torch.zeros(len(keeps) + 1, dtype=torch.int64)
    offsets[1:] = keeps.sum(1).cumsum(0)
    return KeptTokens(keeps.nonzero()[:, 1].int(), offsets)


def kept_case(tokens, vocabulary, dtype, seed=0):
    """Logits, targets, a random mask [T, V] (dense, sparse, the target alone, one that keeps all) and its lists."""
    logits, targets = random_case(tokens, vocabulary, dtype, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    share = torch.tensor([0.9, 0.3, 0.02, 0.0])[torch.arange(tokens) % 4]
    keeps = torch.rand(tokens, vocabulary, generator=generator) < share[:, None]
    keeps.scatter_(1, targets[:, None], True)
    lists = keeps.clone()
    keeps[1], lists[1] = True, False
    return logits, targets, keeps, lists_of(lists)


def exact_kept(logits, targets, keeps, temperature, rows):
    """log-prob, entropy, logsumexp [3, N] of each row's kept logits alone, row by row in float64, and the leaf."""
    leaf, found = logits.detach().double().requires_grad_(), []
    for row in rows.tolist():
        columns = keeps[row].nonzero()[:, 0]
        scaled = leaf[row, columns] / temperature[row].double()
        log_probs = scaled.log_softmax(-1)
        chosen = log_probs[(columns == targets[row]).nonzero()[0, 0]]
        found.append(torch.stack([chosen, -(log_probs.exp() * log_probs).sum(), scaled.logsumexp(-1)]))
    return torch.stack(found, 1), leaf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 65, 1025, 5001])
@pytest.mark.parametrize("in_place", [False, True])
def test_values_and_gradients_against_float64(implementation, dtype, vocabulary, in_place):
    logits, targets, keeps, kept = kept_case(23, vocabulary, dtype)
    temperature = torch.linspace(0.5, 1.5, 23)
    rows = torch.tensor([0, 1, 4, 6, 7, 11, 22])
    expected, leaf = exact_kept(logits, targets, keeps, temperature, rows)
    poisoned = logits.masked_fill(~keeps, math.nan).requires_grad_()  # what is not kept is not read
    x = poisoned * 1.0
    x.retain_grad()
    got = torch.stack(
        grouped_log_prob(x, targets, temperature, rows, kept=kept, grad_in_place=in_place, backend=implementation)
    )
    torch.testing.assert_close(got.double(), expected.detach(), rtol=3e-7, atol=1e-6)
    upstream = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    upstream[:, 3] = 0  # a row that no gradient reaches
    (got * upstream).sum().backward()
    (expected * upstream).sum().backward()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-6}
    torch.testing.assert_close(x.grad.double(), leaf.grad, **tolerance)
    assert (x.grad[~keeps] == 0).all()


def test_formulas_by_finite_differences():
    logits, targets, _, kept = kept_case(5, 9, torch.float64)
    rows = torch.tensor([0, 2, 4])
    assert torch.autograd.gradcheck(
        lambda x: tuple(grouped_log_prob(x, targets, 0.8, rows, kept=kept, backend="reference")),
        (logits.requires_grad_(),),
    )


def test_lists_of_everything_change_nothing(implementation):
    logits, targets = random_case(6, 130, torch.float32)
    plain = torch.stack(grouped_log_prob(logits, targets, 0.7, backend=implementation))
    none = KeptTokens(torch.empty(0, dtype=torch.int32), torch.zeros(7, dtype=torch.int64))
    for kept in (none, lists_of(torch.ones(6, 130, dtype=torch.bool))):
        got = torch.stack(grouped_log_prob(logits, targets, 0.7, kept=kept, backend=implementation))
        assert torch.equal(got, plain)


def test_bits_do_not_depend_on_the_batch_or_the_threads(native):
    logits, targets, _, kept = kept_case(40, 3001, torch.bfloat16)

    def run(tokens):
        begin, end = kept.offsets[tokens.start], kept.offsets[tokens.stop]
        part = KeptTokens(kept.ids[begin:end], kept.offsets[tokens.start : tokens.stop + 1] - begin)
        x = logits[tokens].clone().requires_grad_()
        out = torch.stack(grouped_log_prob(x, targets[tokens], kept=part, backend=native))
        out.sum().backward()
        return out.detach(), x.grad

    whole = run(slice(0, 40))
    torch.set_num_threads(2)
    assert all(torch.equal(a, b) for a, b in zip(whole, run(slice(0, 40)), strict=True))
    values, grad = run(slice(7, 9))
    assert torch.equal(values, whole[0][:, 7:9]) and torch.equal(grad, whole[1][7:9])


def test_from_hidden_states_by_blocks(implementation):
    """Two steps and one pass, with blocks and chunks that cut the lists, against float64 of the masked logits."""
    generator = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(n, 16, generator=generator) for n in (300, 400))
    _, targets, keeps, kept = kept_case(300, 400, torch.float32)
    rows = torch.arange(2, 299)
    leaf_x, leaf_w = x.double().requires_grad_(), weight.double().requires_grad_()
    scaled = ((leaf_x @ leaf_w.t()) / 0.8).masked_fill(~keeps, -math.inf)[rows]
    expected = scaled.log_softmax(-1).gather(1, targets[rows][:, None])[:, 0]
    upstream = torch.randn(len(rows), generator=generator)
    (expected * upstream).sum().backward()

    def two_steps(x, weight):
        found = linear_log_prob(
            x, weight, targets, 0.8, rows, kept=kept, buffer_bytes=128 * 128 * 4, backend=implementation
        ).log_prob
        torch.testing.assert_close(found.double(), expected.detach(), rtol=2e-6, atol=4e-6)
        return (found * upstream).sum()

    def one_pass(x, weight):
        return linear_grpo_loss(
            x, weight, targets, lambda scores, part: ((scores.log_prob * upstream[part]).sum(), None), 0.8, rows,
            kept=kept, chunk_tokens=100, backend=implementation,
        )[0]  # fmt: skip

    for way in (two_steps, one_pass):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        way(*leaves).backward()
        for ours, theirs in zip(leaves, (leaf_x, leaf_w), strict=True):
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=2e-5)


def test_operators_pass_torchs_own_checks(native):
    logits, targets, _, kept = kept_case(6, 40, torch.float32)
    for chosen in (None, torch.tensor([1, 2, 5])):
        arguments = (
            logits.clone().requires_grad_(),
            targets,
            torch.ones(1),
            chosen,
            kept.ids,
            kept.ranges(),
            0,
            40,
            "",
        )
        torch.library.opcheck(torch.ops.r1mega_kernels.log_prob.default, (*arguments, True, False, False))


def test_the_default_dtype_and_device_change_nothing(native):
    """A scratch of bfloat16 would be half of what the kernels write."""
    logits, targets, _, kept = kept_case(16, 2000, torch.float32)
    grads = []
    for dtype, device in ((torch.float32, "cpu"), (torch.bfloat16, "meta")):
        leaf = logits.clone().requires_grad_()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                grouped_log_prob(leaf, targets, kept=kept, backend=native).log_prob.sum().backward()
        finally:
            torch.set_default_dtype(torch.float32)
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize(("dtype", "lacking"), [(torch.bfloat16, 0), (torch.float32, 1)])
def test_a_scratch_that_is_too_small_is_refused(native, dtype, lacking):
    logits, targets, _, kept = kept_case(4, 40, torch.float32)
    scratch = torch.zeros(len(kept.ids) - lacking, dtype=dtype)
    statistics, rows, out = torch.ones(4, 4), torch.zeros(3, 4), torch.empty(4, 40)
    with pytest.raises(RuntimeError):
        torch.ops.r1mega_kernels.kept_log_prob_backward(
            logits, targets, torch.ones(1), targets, False, 0, statistics, rows[0], rows, out, *kept[:1], kept.ranges(),
            scratch,
        )  # fmt: skip


def test_offsets_that_nobody_has_looked_at_stay_within_the_lists(monkeypatch):
    """As on a GPU (a CPU's operator looks itself). A list that would end before it begins is an empty one."""
    kept = KeptTokens(torch.tensor([0, 2, 4], dtype=torch.int32), torch.tensor([-5, 2, 1 << 40, 1]))
    assert kept.ranges().tolist() == [[0, 2], [2, 3], [3, 3]]
    monkeypatch.setattr("r1mega_kernels.log_prob.looks_at_values", lambda x: False)
    leaf = torch.zeros(3, 5).requires_grad_()
    found = grouped_log_prob(leaf, torch.tensor([2, 4, 1]), kept=kept, backend="reference").log_prob
    found.sum().backward()
    torch.testing.assert_close(found.detach().exp(), torch.tensor([1 / 2, 1, 1 / 5]))
    assert leaf.grad.isfinite().all()


def test_blocks_share_one_scratch(native):
    x, weight = torch.randn(300, 16), torch.randn(400, 16)
    _, targets, _, kept = kept_case(300, 400, torch.float32)
    sizes = []

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            if function is torch.ops.aten.empty.memory_format:
                sizes.append(math.prod(arguments[0]))
            return function(*arguments, **(options or {}))

    leaf = x.requires_grad_()
    loss = linear_log_prob(leaf, weight, targets, kept=kept, buffer_bytes=128 * 128 * 4).log_prob.sum()
    with Allocations():
        loss.backward()
    assert sizes.count(len(kept.ids)) == 1


@pytest.mark.heavy
def test_torch_compile_in_one_graph(native):
    logits, targets, _, kept = kept_case(12, 60, torch.float32)

    def compute(x, ids, offsets):
        return torch.stack(grouped_log_prob(x, targets, kept=KeptTokens(ids, offsets))).square().sum()

    found = []
    torch._dynamo.reset()
    for function in (compute, torch.compile(compute, fullgraph=True, backend="aot_eager")):
        leaf = logits.clone().requires_grad_()
        function(leaf, *kept).backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("ids", "offsets", "error", "message"),
    [
        ([0, 2, 1], [0, 1, 3, 3], ValueError, "strictly increasing"),
        ([0, 2, 2], [0, 1, 3, 3], ValueError, "strictly increasing"),
        ([0, 2, 5], [0, 1, 3, 3], ValueError, r"ids in \[0, 5\)"),
        ([0, 2, 3], [0, 1, 2, 2], ValueError, "rise from 0 to 3"),
        ([0, 2, 3], [0, 1, 3], ValueError, r"kept.offsets \[4\]"),
        ([0, 2, 3], [0, 1, 3, 3], ValueError, "target of token 1, 1, is not among"),
        ([0, 2, 3], None, TypeError, "kept.ids must be int32 and kept.offsets int64"),
    ],
)
def test_wrong_lists(implementation, ids, offsets, error, message):
    ids, targets = torch.tensor(ids, dtype=torch.int32), torch.tensor([0, 1, 4])
    kept = KeptTokens(ids, torch.tensor(offsets or [0, 1, 3, 3], dtype=torch.int64 if offsets else torch.int32))
    with pytest.raises(error, match=message):
        grouped_log_prob(torch.zeros(3, 5), targets, kept=kept, backend=implementation)
    with pytest.raises(error, match=message):
        linear_log_prob(torch.zeros(3, 2), torch.zeros(5, 2), targets, kept=kept, backend=implementation)


def test_lists_of_rows_that_are_not_chosen_are_not_looked_at(native):
    """Nor read: the offsets of one of them lie outside the lists."""
    kept = KeptTokens(torch.tensor([1, 3, 0], dtype=torch.int32), torch.tensor([0, 2, 900, 2, 3]))
    logits, rows = torch.randn(4, 5).requires_grad_(), torch.tensor([0, 3])
    grouped_log_prob(logits, torch.tensor([3, 9, 9, 0]), rows=rows, kept=kept, backend=native).log_prob.sum().backward()
    assert (logits.grad[:, [2, 4]] == 0).all() and logits.grad[0, 1] < 0 < logits.grad[0, 3]
    with pytest.raises(ValueError, match="kept.offsets must rise from 0 to 3, not from 2 to 900 at token 1"):
        grouped_log_prob(logits, torch.tensor([3, 0, 0, 0]), kept=kept, backend=native)


def test_lists_of_chosen_rows_that_overlap_are_refused(implementation):
    """They would share a scratch, between threads; the offsets fall at a token that is not chosen."""
    kept = KeptTokens(torch.tensor([1, 3], dtype=torch.int32), torch.tensor([0, 2, 0, 2]))
    with pytest.raises(ValueError, match="kept.offsets must rise from 0 to 2, not"):
        grouped_log_prob(
            torch.zeros(3, 5), torch.tensor([1, 0, 3]), rows=torch.tensor([0, 2]), kept=kept, backend=implementation
        )


def test_a_target_outside_its_list_is_nan_where_values_are_not_looked_at(monkeypatch):
    monkeypatch.setattr("r1mega_kernels.log_prob.looks_at_values", lambda x: False)
    kept = KeptTokens(torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0, 2]))
    got = grouped_log_prob(torch.zeros(1, 5), torch.tensor([1]), kept=kept, backend="reference")
    assert got.log_prob.isnan().all() and got.entropy.isfinite().all()
