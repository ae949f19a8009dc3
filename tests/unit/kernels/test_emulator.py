"""The CUDA kernels' own source on the CPU, thread by thread under the sanitizers, against the float64 references."""

from __future__ import annotations

import math
import os
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import r1mega_kernels
from r1mega_kernels import group_advantage, grpo_token_loss
from tests.unit.kernels.test_kept import exact_kept, kept_case, lists_of
from tests.unit.kernels.test_log_prob import exact, random_case
from tests.unit.kernels.test_loss import random_tokens

pytestmark = pytest.mark.heavy

KERNELS = Path(r1mega_kernels.__file__).parents[1]
FLAGS = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wall", "-Wextra"]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("no g++, so no emulator")
    program = tmp_path_factory.mktemp("emulator") / "emulator"
    include = [f"-I{KERNELS / folder}" for folder in ("include", "emu")]
    source = str(KERNELS / "emu" / "main.cpp")
    command = ["g++", *FLAGS, "-Wno-unknown-pragmas", "-DR1_EMULATED", *include, source, "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def run(program, kernel, *arrays, check=True):
    """Output bytes of a kernel on arrays (tensors, or lists of ints as int64)."""
    message = kernel.encode() + b"\n"
    for array in arrays:
        tensor = array if isinstance(array, torch.Tensor) else torch.tensor(array, dtype=torch.int64)
        tensor = tensor.contiguous()
        data = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy().tobytes()
        message += struct.pack("<q", len(data)) + data
    alone = {
        name: value for name, value in os.environ.items() if name != "LD_PRELOAD"
    }  # vLLM sets it; ASan wants to be first
    done = subprocess.run([program], input=message, capture_output=True, timeout=120, env=alone)
    if check:
        assert done.returncode == 0, done.stderr.decode()[-3000:]
    return done


def run_log_prob(
    program, logits, targets, inverse, rows, grads, order=0, misalignment=0, in_place=0, kept=None, start=0, entropy=1,
    gradient=None,
):  # fmt: skip
    """(results [3, N], gradient [T, V]). start: the id of the first column; gradient: its dtype, in place of fp32 logits."""
    tokens, columns = logits.shape
    positions = torch.empty(0, dtype=torch.int32)
    if rows is not None:
        positions = torch.full((tokens,), -1, dtype=torch.int32)
        positions[rows] = torch.arange(len(rows), dtype=torch.int32)
    count = tokens if rows is None else len(rows)
    scalars = [
        tokens,
        columns,
        columns,
        start,
        count,
        order,
        misalignment,
        in_place or int(gradient is not None),
        entropy,
    ]
    kernel = "log_prob_bf16" if logits.dtype == torch.bfloat16 else "log_prob_f32"
    arrays = [scalars, logits, targets, [] if rows is None else rows, inverse, positions, grads]
    if kept is not None:
        kernel, arrays = f"kept_{kernel}", [*arrays, kept.ids, kept.ranges()]
    if gradient is not None:
        kernel += {torch.bfloat16: "_to_bf16", torch.float16: "_to_f16"}[gradient]
    out = run(program, kernel, *arrays).stdout
    results = torch.from_numpy(np.frombuffer(out[: 12 * count], dtype=np.float32).copy()).view(3, count)
    raw = np.frombuffer(out[12 * count :], dtype=np.int16 if logits.dtype == torch.bfloat16 else np.float32).copy()
    if gradient is not None:  # each row's first half
        return results, torch.from_numpy(raw).view(gradient).view(tokens, 2 * columns)[:, :columns]
    return results, torch.from_numpy(raw).view(logits.dtype).view(tokens, columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 7, 8, 1003, 1025, 9000])  # up to 1024 a warp's
def test_log_prob_and_gradient(emulator, dtype, vocabulary):
    logits, targets = random_case(5, vocabulary, dtype)
    rows = torch.tensor([0, 2, 4])
    temperature = torch.tensor([0.5, 1.0, 0.9, 1.0, 1.5])
    grads = torch.tensor([[1.0, 0.0, -2.0], [0.3, 0.0, 0.1], [0.0, 0.0, 0.5]])  # no gradient reaches the second
    expected, leaf = exact(logits, targets, temperature, rows)
    (expected * grads).sum().backward()
    misalignment = logits.element_size()
    case = (emulator, logits, targets, 1 / temperature, rows, grads)
    results, grad = run_log_prob(*case)
    torch.testing.assert_close(results.double(), expected.detach(), rtol=3e-7, atol=2e-6)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-6}
    torch.testing.assert_close(grad.double(), leaf.grad, **tolerance)
    # the same bits whatever the address, the order in which threads and blocks run, and where the gradient goes
    for variant in ({"order": 1}, {"misalignment": misalignment}, {"in_place": 1, "order": 1}):
        other = run_log_prob(*case, **variant)
        assert torch.equal(other[0], results) and torch.equal(other[1], grad), variant


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "vocabulary", [400, 16160]
)  # a nano model's, an eighth of 129280: 1 and 2 (4 of fp32) rounds a thread
def test_a_row_is_read_in_as_few_rounds_as_it_can_be(emulator, dtype, vocabulary):
    """The emulator counts and refuses more (`check_rounds`): a remainder whose steps wait for memory one after the other, and
    short rows of a whole block, compute the same."""
    logits, targets = random_case(2, vocabulary, dtype)
    results, _ = run_log_prob(emulator, logits, targets, torch.ones(1), None, torch.zeros(3, 2))
    torch.testing.assert_close(results.double(), exact(logits, targets, 1.0)[0].detach(), rtol=3e-7, atol=2e-6)


@pytest.mark.parametrize("seed", range(6))
def test_drawn_widths_masks_and_addresses(emulator, seed):
    """Widths on both sides of where kernels, steps and packs end; -inf and least numbers; several rows a warp kernel's block."""
    draw = np.random.default_rng(seed)
    dtype = (torch.float32, torch.bfloat16)[seed % 2]
    edge = (int(draw.integers(1, 40)), 1024, 2048, 4096, 512, 8192)[seed]
    vocabulary, tokens = max(2, edge + int(draw.integers(-9, 10))), int(draw.integers(1, 20 if edge <= 1024 else 5))
    logits, targets = random_case(tokens, vocabulary, dtype, seed, spread=float(draw.uniform(0.1, 12)))
    masked = torch.from_numpy(draw.random((tokens, vocabulary)) < draw.choice([0.0, 0.5, 0.99]))
    masked.scatter_(1, targets[:, None], False)
    logits = logits.masked_fill(masked, draw.choice([-math.inf, torch.finfo(dtype).min]))
    rows = torch.from_numpy(np.flatnonzero(draw.random(tokens) < 0.8)) if tokens > 1 and draw.random() < 0.7 else None
    temperature = torch.from_numpy(draw.uniform(0.3, 3, tokens)).float()
    grads = torch.from_numpy(draw.normal(size=(3, tokens if rows is None else len(rows)))).float()
    if not grads.numel():
        return
    expected, leaf = exact(logits.double().masked_fill(masked, -1e6), targets, temperature, rows)
    (expected * grads).sum().backward()
    place = {
        "order": int(draw.integers(2)),
        "misalignment": int(draw.integers(16 // logits.element_size())) * logits.element_size(),
    }
    case = (emulator, logits, targets, 1 / temperature, rows, grads)
    results, grad = run_log_prob(*case, **place, in_place=int(draw.integers(2)))
    torch.testing.assert_close(results.double(), expected.detach(), rtol=1e-6, atol=3e-6)
    wanted = leaf.grad.masked_fill(masked, 0)
    tolerance = {"rtol": 2e-5, "atol": 3e-6} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 3e-6}
    torch.testing.assert_close(grad.double(), wanted, **tolerance)
    quick = run_log_prob(*case[:-1], grads * torch.tensor([[1.0], [0.0], [1.0]]), **place, entropy=0)
    assert torch.equal(quick[0][[0, 2]], results[[0, 2]]) and quick[0][1].isnan().all()


@pytest.mark.parametrize("vocabulary", [5, 1004, 5001, 5008])  # rows of the second and the last are aligned
@pytest.mark.parametrize("gradient", [torch.bfloat16, torch.float16])
def test_narrow_gradients_in_the_place_of_the_logits(emulator, vocabulary, gradient):
    """The bits are torch's rounding of the fp32 gradient, whatever thread writes first; of kept ids too."""
    logits, targets, keeps, kept = kept_case(9, vocabulary, torch.float32)
    keeps[2], lists = True, keeps.clone()
    lists[2] = False  # keeps every id
    kept = lists_of(lists)
    rows = torch.tensor([0, 1, 2, 4, 5, 8])
    grads = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)) * 1e-3
    grads[:, 3] = 0
    for lists_too in (None, kept):
        case = (emulator, logits, targets, torch.ones(1), rows, grads)
        results, wide = run_log_prob(*case, kept=lists_too)
        for order, misalignment in ((0, 0), (1, 0), (1, 4)) if lists_too is None else ((1, 0), (1, 4)):
            other, grad = run_log_prob(*case, order, misalignment, kept=lists_too, gradient=gradient)
            assert torch.equal(other, results), (order, misalignment)
            assert torch.equal(grad, wide.to(gradient)), (order, misalignment, lists_too is None)
    if gradient == torch.float16:  # beyond its range
        _, grad = run_log_prob(
            emulator, logits[:1], targets[:1], torch.ones(1), None, torch.full((3, 1), 1e8), gradient=gradient
        )
        assert grad.isinf().any() and not grad.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [7, 9000])
def test_without_entropy_the_other_results_have_the_same_bits(emulator, dtype, vocabulary):
    logits, targets, _, kept = kept_case(5, vocabulary, dtype)
    grads = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    grads[1] = 0
    for lists in (None, kept):
        case = (emulator, logits, targets, torch.ones(1), None, grads)
        results, grad = run_log_prob(*case, kept=lists)
        other = run_log_prob(*case, kept=lists, entropy=0)
        assert torch.equal(other[0][[0, 2]], results[[0, 2]]) and torch.equal(other[1], grad)
        assert other[0][1].isnan().all() and not results.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 65, 5001])
def test_kept_ids(emulator, dtype, vocabulary):
    logits, targets, keeps, kept = kept_case(8, vocabulary, dtype)
    rows = torch.tensor([0, 1, 3, 4, 6])
    grads = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    grads[:, 3] = 0
    temperature = torch.linspace(0.5, 1.5, 8)
    expected, leaf = exact_kept(logits, targets, keeps, temperature, rows)
    (expected * grads).sum().backward()
    case = (emulator, logits.masked_fill(~keeps, math.nan), targets, 1 / temperature, rows, grads)
    results, grad = run_log_prob(*case, kept=kept)
    torch.testing.assert_close(results.double(), expected.detach(), rtol=3e-7, atol=2e-6)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-6}
    torch.testing.assert_close(grad.double(), leaf.grad, **tolerance)
    for variant in ({"order": 1}, {"misalignment": logits.element_size()}, {"in_place": 1, "order": 1}):
        other = run_log_prob(*case, **variant, kept=kept)
        assert torch.equal(other[0], results) and torch.equal(other[1], grad), variant


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_ids_of_one_shard(emulator, dtype):
    """The columns in the middle: lists that begin before them and end after them, one of ids that are all elsewhere, one of
    every id; log-probs of targets that are here."""
    begin, end = 1500, 4100
    logits, targets, keeps, kept = kept_case(8, 5001, dtype)
    targets[[0, 1, 2, 3, 7]] = torch.tensor([1500, 3000, 4099, 2000, 1501])
    targets[[4, 5]] = torch.tensor([1499, 4100])
    keeps.scatter_(1, targets[:, None], True)
    keeps[4, begin:end] = False
    lists = keeps.clone()
    lists[1] = False
    kept, here, shard = lists_of(lists), keeps[:, begin:end], logits[:, begin:end]
    grads = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    held = (targets >= begin) & (targets < end)
    grads[0, ~held] = 0
    leaf = shard.double().requires_grad_()
    chosen = [row for row in range(8) if row != 4]
    scaled = leaf.masked_fill(~here, -math.inf)[chosen] / 0.7
    log_probs = scaled.log_softmax(-1)
    at_target = log_probs.gather(1, (targets[chosen] - begin).clamp(0, end - begin - 1)[:, None])[:, 0]
    entropy = -(log_probs.exp() * log_probs.masked_fill(~here[chosen], 0)).sum(1)
    expected = torch.stack([torch.where(held[chosen], at_target, 0), entropy, scaled.logsumexp(1)])
    (expected * grads[:, chosen]).sum().backward()
    case = (emulator, shard.masked_fill(~here, math.nan), targets, torch.tensor([1 / 0.7]), None, grads)
    results, grad = run_log_prob(*case, kept=kept, start=begin)
    assert results[0, ~held].isnan().all()
    got = torch.where(held, results[0], 0), *results[1:]
    torch.testing.assert_close(torch.stack(got)[:, chosen].double(), expected.detach(), rtol=3e-7, atol=2e-6)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-6}
    assert (grad[4] == 0).all()
    torch.testing.assert_close(grad[chosen].double(), leaf.grad[chosen], **tolerance)


def test_rows_are_independent_of_their_neighbours(emulator):
    logits, targets = random_case(4, 1003, torch.bfloat16)
    grads = torch.ones(3, 4)
    whole = run_log_prob(emulator, logits, targets, torch.ones(1), None, grads)
    alone = run_log_prob(emulator, logits[2:3], targets[2:3], torch.ones(1), None, grads[:, :1])
    assert torch.equal(alone[0][:, 0], whole[0][:, 2]) and torch.equal(alone[1][0], whole[1][2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_masked_by_the_least_number(emulator, dtype):
    """Whole threads see them alone; a row of nothing else has no log-prob, as one of -inf has none."""
    logits, targets = random_case(3, 9001, dtype)
    logits[0, :8200] = logits[1, 100:] = logits[2] = torch.finfo(dtype).min
    targets[:] = torch.tensor([8500, 3, 7])
    results, grad = run_log_prob(emulator, logits, targets, torch.ones(1), None, torch.ones(3, 3))
    expected, leaf = exact(logits[:2], targets[:2], 1.0)
    expected.sum().backward()
    torch.testing.assert_close(results[:, :2].double(), expected.detach(), rtol=3e-7, atol=2e-6)
    torch.testing.assert_close(grad[:2].double(), leaf.grad, rtol=2**-8, atol=1e-6)
    assert results[0, 2].isnan()


def test_masked_columns_and_not_a_number(emulator):
    logits, targets = random_case(5, 2100, torch.float32)
    inf = float("inf")
    logits[0] -= 200
    logits[1, :2050] = -inf  # whole threads see masked columns only
    targets[1] = 2099
    logits[2, 700] = float("nan")
    logits[3, 5] = inf
    logits[4] = -inf
    results, grad = run_log_prob(emulator, logits, targets, torch.ones(1), None, torch.ones(3, 5))
    expected, leaf = exact(logits[:2], targets[:2], 1.0)
    expected.sum().backward()
    torch.testing.assert_close(results[:, :2].double(), expected.detach(), rtol=3e-7, atol=2e-6)
    assert (grad[1, :2050] == 0).all() and results[:, 2:4].isnan().all() and results[0, 4].isnan()
    torch.testing.assert_close(grad[0].double(), leaf.grad[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("count", "surrogate", "corrected"),
    [(1, "clip", False), (100, "clip", False), (5000, "clip", False), (300, "cispo", True), (300, "sapo", True)],
)
def test_token_loss(emulator, count, surrogate, corrected):
    """The emulator also looks that the sums of 3 blocks are added by as many threads."""
    dual_clip = 3.0 if surrogate == "clip" else None
    policy, old, reference, sampler, advantages, weights = (t.float() for t in random_tokens(count))
    mask = torch.rand(count, generator=torch.Generator().manual_seed(1)) > 0.2
    ids = torch.arange(count) // 7
    advantages = advantages[: int(ids.max()) + 1]
    options = torch.tensor([0.2, 0.28, dual_clip or 0, 0.1, 1.2, 1.5, 2.0], dtype=torch.float64)
    leaf = policy.double().requires_grad_()
    loss, metrics = grpo_token_loss(
        leaf, advantages.double(), old.double(), reference_log_probs=reference.double(),
        sampler_log_probs=sampler.double(), weights=weights.double(), mask=mask, sequence_ids=ids, clip_low=0.2,
        clip_high=0.28, dual_clip=dual_clip, kl_coefficient=0.1, importance_cap=1.2, surrogate=surrogate,
        sapo_temperatures=(1.5, 2.0), kl_bias_correction=corrected, backend="reference",
    )  # fmt: skip
    loss.backward()
    outputs = []
    for order in (0, 1):
        arrays = (options, policy, old, reference, sampler, advantages, weights, mask.to(torch.uint8), ids)
        scalars = [order, 0, ("clip", "cispo", "sapo").index(surrogate), int(corrected)]
        out = run(emulator, "token_loss", scalars, *arrays).stdout
        outputs.append((np.frombuffer(out[: 4 * count], np.float32), np.frombuffer(out[4 * count :], np.float64)))
    assert all(np.array_equal(a, b) for a, b in zip(*outputs, strict=True))
    grad, sums = (torch.from_numpy(a.copy()) for a in outputs[0])
    torch.testing.assert_close(grad.double(), leaf.grad, rtol=1e-5, atol=1e-6)
    expected = [loss.detach(), metrics.num_tokens, metrics.clipped, metrics.kl, metrics.mismatch_sum]
    expected += [metrics.mismatch_max, metrics.truncated, metrics.ratio_sum]
    torch.testing.assert_close(sums, torch.stack([e.double() for e in expected]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("baseline", [0, 1])
@pytest.mark.parametrize("scale", [0, 1, 2])
def test_group_advantage(emulator, baseline, scale):
    lengths = [1, 0, 16, 33, 2, 64, 3, 8, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5]
    offsets = torch.tensor([0, *np.cumsum(lengths).tolist()])
    rewards = torch.randint(0, 4, (sum(lengths),), generator=torch.Generator().manual_seed(2)).double() / 3
    mask = torch.rand(len(rewards), generator=torch.Generator().manual_seed(3)) > 0.2
    expected = group_advantage(
        rewards, offsets, mask, baseline=("group", "leave_one_out")[baseline], scale=("none", "group", "batch")[scale],
        backend="reference",
    )  # fmt: skip
    epsilon = torch.tensor([1e-6], dtype=torch.float64)
    for order in (0, 1):
        out = run(
            emulator, "group_advantage", [order, baseline, scale], epsilon, rewards, offsets, mask.to(torch.uint8)
        )
        got = torch.from_numpy(np.frombuffer(out.stdout, np.float32).copy())
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("case", "message"), [("divergent_barrier", b"deadlock"), ("out_of_bounds", b"heap-buffer-overflow")]
)
def test_the_emulator_sees_what_it_is_there_for(emulator, case, message):
    done = run(emulator, case, check=False)
    assert done.returncode != 0 and message in done.stderr
