"""Ranks of the tests of FP8 in a whole model: a policy of the nano model over the stand-in, with `stand_in.install` before."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from r1mega.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from r1mega.platform import groups
from r1mega.train.packing import Microbatch, build_microbatch
from r1mega.train.policy import Policy

NANO = json.loads((Path(__file__).parents[2] / "configs/nano/model/config.json").read_text())
RECIPES = ("tensorwise", "blockwise")


def make_policy(fp8: str, layout: ParallelConfig | None = None, dtype: str = "float32", **model: Any) -> Policy:
    """Weights and a step are the same whatever the precision."""
    settings = ModelConfig(path="unused", dtype=dtype, fp8=fp8, **model)
    return Policy(
        settings, NANO, layout or ParallelConfig(), OptimizerConfig(lr=1e-9), total_steps=10**6, seed=0, init_std=0.05
    )  # fmt: skip


def batch_of(lengths: list[int]) -> Microbatch:
    """Samples of random tokens; all but the first of each are trained."""
    generator = torch.Generator().manual_seed(sum(lengths))
    samples = [torch.randint(3, NANO["vocab_size"], (n,), generator=generator).tolist() for n in lengths]
    return build_microbatch(samples, [1] * len(lengths), range(len(lengths)))


def two_samples(length: int) -> Microbatch:
    return batch_of([length] if length < 3 else [length // 3, length - length // 3])


def step(policy: Policy, batch: Microbatch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """(log-probs [R] before, log-probs [R] of the training pass, gradients by name) of the mean of log-probs."""
    gradients: dict[str, torch.Tensor] = {}
    stepping = policy.optimizer.step

    def capture() -> Any:
        for chunk in policy.chunks:
            gradients.update({name: p.main_grad.clone() for name, p in chunk.named_parameters()})
        return stepping()

    count = max(1, batch.rows.numel())
    old = policy.log_probs([batch])[0][0]
    policy.optimizer.step = capture
    try:
        result = policy.update(
            [batch], lambda _i, _mb, lp, _ent: (lp.sum() / count, lp.detach().clone()), total_response_tokens=count
        )
    finally:
        policy.optimizer.step = stepping
    return old, result.statistics[0], gradients


def differences(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative to the norm of a gradient of `one`."""
    return {name: float((one[name] - two[name]).norm() / one[name].norm().clamp(min=1e-12)) for name in one}


@contextlib.contextmanager
def aligned(policy: Policy, multiple: int):
    cut = policy._cut
    policy._cut = dataclasses.replace(cut, align=multiple)
    try:
        yield
    finally:
        policy._cut = cut


def one_rank() -> dict[str, Any]:
    """What one process finds, by check and recipe."""
    groups.init_parallel(ParallelConfig(), seed=0)
    try:
        plain = step(make_policy("off"), two_samples(61))
        found: dict[Any, Any] = {recipe: _checks(recipe, plain) for recipe in RECIPES}
        for skipped in ((0, 0), (1, 0), (0, 1), (1, 1), (2, 0)):
            found["unquantised layers", *skipped] = unquantised_layers(*skipped)
        return found
    finally:
        groups.destroy()


def _checks(recipe: str, plain: Any) -> dict[str, Any]:
    from megatron.core.fp8_utils import get_fp8_recipe
    from transformer_engine.pytorch.quantization import get_align_size_for_quantization

    policy = make_policy(recipe)
    made = get_fp8_recipe(policy.megatron_config)
    found: dict[str, Any] = {
        "recipe": str(made),
        "alignment": (policy._cut.align, get_align_size_for_quantization(made)),
    }
    # every length: the pass with gradients and the one without are the same, to the bit
    found["unequal lengths"] = []
    for length in (*range(1, 34), 127, 128, 129):
        old, new, _ = step(policy, two_samples(length))
        if not torch.equal(old, new) or not old.isfinite().all():
            found["unequal lengths"].append(length)
    batch = two_samples(61)
    old, new, gradients = step(policy, batch)
    found["log_probs"] = float((old - plain[0]).abs().mean()), float((old - plain[0]).abs().max())
    found["gradients"] = differences(plain[2], gradients)
    with aligned(policy, 48):
        more = step(policy, batch)
    found["padding"] = float((old - more[0]).abs().max()), max(differences(gradients, more[2]).values())
    policy._zeroing.padding, zeroing, policy._zeroing = None, policy._zeroing, None
    with aligned(policy, 48):
        unzeroed = step(policy, batch)
    policy._zeroing = zeroing
    found["reference"] = _reference(policy, batch)
    found["padding not zeroed"] = max(differences(gradients, unzeroed[2]).values())
    again = step(make_policy(recipe, recompute="full"), batch)
    found["recomputed"] = torch.equal(again[0], again[1]), torch.equal(again[0], old), max(differences(gradients, again[2]).values())
    return found


@torch.no_grad()
def _reference(policy: Policy, batch: Microbatch) -> list[bool]:
    """Transformer Engine keeps quantised weights from microbatch to microbatch: other weights must be quantised anew.

    [new weights give other log-probs, the reference's give its own, and then the new ones' come back], of two microbatches.
    """

    def both() -> torch.Tensor:
        return torch.stack([log_probs for log_probs, _ in policy.log_probs([batch, batch])])

    before = both()
    policy.take_reference()
    for parameter in policy.chunks[0].parameters():
        parameter.mul_(1.1)
    after = both()
    with policy.as_reference():
        reference = both()
    return [bool((after[0] - before[0]).abs().max() > 1e-3), torch.equal(reference, before), torch.equal(both(), after)]


def unquantised_layers(first: int, last: int) -> list[bool]:
    """Of each layer, whether it gives, to the bit, what the layer without FP8 gives for the same hidden states."""
    plain = make_policy("off").chunks[0].decoder.layers
    policy = make_policy("blockwise", fp8_skip_first_layers=first, fp8_skip_last_layers=last)
    same = []
    for number, layer in enumerate(policy.chunks[0].decoder.layers):
        layer.register_forward_hook(
            lambda _layer, _arguments, keywords, output, n=number: same.append(torch.equal(plain[n](**keywords)[0], output[0])),
            with_kwargs=True,
        )
    policy.log_probs([two_samples(61)])
    return same


def two_ranks(layout: dict[str, int]) -> dict[str, Any]:
    """This rank's part, by recipe; every length, samples of one token and microbatches without samples among them."""
    layout = ParallelConfig(**layout)
    groups.init_parallel(layout, seed=0)
    try:
        batch = two_samples(61)
        plain = step(make_policy("off", layout), batch)
        found = {}
        for recipe in RECIPES:
            policy = make_policy(recipe, layout)
            old, new, gradients = step(policy, batch)
            unequal = [] if torch.equal(old, new) else [61]
            for lengths in ([], [1], [2], [3, 1, 7], [33], [64]):
                old_too, new_too, of_it = step(policy, batch_of(lengths))
                if not torch.equal(old_too, new_too) or not all(g.isfinite().all() for g in of_it.values()):
                    unequal.append(sum(lengths))
            found[recipe] = {
                "unequal lengths": unequal,
                "log_probs": (float((old - plain[0]).abs().mean()), float((old - plain[0]).abs().max())),
                "gradients": differences(plain[2], gradients),
            }
        return found
    finally:
        groups.destroy()
