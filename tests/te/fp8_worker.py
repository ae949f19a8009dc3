"""Ranks of the tests of FP8 in a whole model: a policy of the nano model over the stand-in, with `stand_in.install` before."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from r1mega.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from r1mega.gpu_check.findings import Context, Findings
from r1mega.platform import groups
from r1mega.train.packing import Microbatch, build_microbatch
from r1mega.train.policy import Policy
from r1mega.train.trainer import Trainer

NANO = json.loads((Path(__file__).parents[2] / "configs/nano/model/config.json").read_text())
RECIPES = ("tensorwise", "blockwise")
LENGTHS = (*range(1, 18), 31, 32, 33, 127, 128, 129)


def make_trainer(fp8: str, layout: ParallelConfig | None = None, dtype: str = "float32", **model: Any) -> Trainer:
    """Weights are the same whatever the precision, and steps (of 1e-30) leave them so. The token of padding is an outlier: of
    all hidden sizes it has one.
    """
    settings = ModelConfig(path="unused", dtype=dtype, fp8=fp8, **model)
    policy = Policy(settings, NANO, layout or ParallelConfig(), seed=0, init_std=0.05)
    weight = policy.chunks[0].embedding.word_embeddings.weight
    if weight.shape[0] == NANO["vocab_size"] or policy._cut.tp_rank == 0:
        weight.data[0] = 0
        weight.data[0, 0] = 1
    return Trainer(policy, OptimizerConfig(lr=1e-30), total_steps=10**6)


def batch_of(lengths: list[int], dictated: bool = False) -> Microbatch:
    """Samples of random tokens; all but the first of each are trained. dictated: to which experts they go, at random."""
    generator = torch.Generator().manual_seed(sum(lengths))
    samples = [torch.randint(3, NANO["vocab_size"], (n,), generator=generator).tolist() for n in lengths]
    scores = [torch.rand(n - 1, 1, NANO["n_routed_experts"], generator=generator) for n in lengths]
    chosen = [part.topk(NANO["num_experts_per_tok"]).indices.to(torch.uint8).numpy() for part in scores]
    return build_microbatch(samples, [1] * len(lengths), range(len(lengths)), chosen if dictated else None)


def two_samples(length: int, dictated: bool = False) -> Microbatch:
    return batch_of([length] if length < 3 else [length // 3, length - length // 3], dictated)


def gpu_check_step(name: str, work: Path) -> Findings:
    """A step of tools/gpu_check.py (r1mega/gpu_check/policy.py), whose files lie in `work`."""
    from r1mega.gpu_check import policy

    findings = Findings()
    getattr(policy, name)(Context("cpu", work), findings)
    return findings


def step(trainer: Trainer, batch: Microbatch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """(log-probs [R] before, log-probs [R] of the training pass, gradients by name) of the mean of log-probs."""
    gradients: dict[str, torch.Tensor] = {}
    stepping = trainer.optimizer.step

    def capture() -> Any:
        for chunk in trainer.policy.chunks:
            gradients.update({name: p.main_grad.clone() for name, p in chunk.named_parameters()})
        return stepping()

    count = max(1, batch.rows.numel())
    (old,) = trainer.policy.log_probs([batch])
    trainer.optimizer.step = capture
    try:
        result = trainer.update(
            [batch], lambda _, scores: (scores.values.sum() / count, scores.values.detach().clone()),
            total_response_tokens=count,
        )  # fmt: skip
    finally:
        trainer.optimizer.step = stepping
    return old, result.statistics[0], gradients


def differences(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative to the norm of a gradient of `one`."""
    return {name: float((one[name] - two[name]).norm() / one[name].norm().clamp(min=1e-12)) for name in one}


def against(plain: Any, quantised: Any) -> dict[str, Any]:
    """What FP8 changes: of log-probs (mean, max), of gradients. Of dictated experts: another one is no rounding error."""
    difference = (quantised[0] - plain[0]).abs()
    return {
        "log_probs": (float(difference.mean()), float(difference.max())),
        "gradients": differences(plain[2], quantised[2]),
    }


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
        plain = step(make_trainer("off"), two_samples(61, dictated=True))
        found: dict[Any, Any] = {recipe: _checks(recipe, plain) for recipe in RECIPES}
        for skipped in ((0, 0), (1, 0), (0, 1), (1, 1), (2, 0)):
            found["unquantised layers", *skipped] = unquantised_layers(*skipped)
        return found
    finally:
        groups.destroy()


def _checks(recipe: str, plain: Any) -> dict[str, Any]:
    from megatron.core.fp8_utils import get_fp8_recipe
    from transformer_engine.pytorch.quantization import get_align_size_for_quantization

    trainer = make_trainer(recipe)
    policy = trainer.policy
    made = get_fp8_recipe(policy.megatron_config)
    found: dict[str, Any] = {
        "recipe": str(made),
        "alignment": (policy._cut.align, get_align_size_for_quantization(made)),
    }
    # every length: the pass with gradients and the one without are the same, to the bit
    found["unequal lengths"] = []
    for length in LENGTHS:
        old, new, _ = step(trainer, two_samples(length))
        if not torch.equal(old, new) or not old.isfinite().all():
            found["unequal lengths"].append(length)
    batch = two_samples(61)
    old, new, gradients = step(trainer, batch)
    found |= against(plain, step(trainer, two_samples(61, dictated=True)))
    with aligned(policy, 48):
        more = step(trainer, batch)
    found["padding"] = float((old - more[0]).abs().max()), max(differences(gradients, more[2]).values())
    policy._zeroing.padding, zeroing, policy._zeroing = None, policy._zeroing, None
    with aligned(policy, 48):
        unzeroed = step(trainer, batch)
    policy._zeroing = zeroing
    found["reference"] = _reference(policy, batch)
    found["padding not zeroed"] = max(differences(gradients, unzeroed[2]).values())
    again = step(make_trainer(recipe, recompute="full"), batch)
    found["recomputed"] = (
        torch.equal(again[0], again[1]),
        torch.equal(again[0], old),
        max(differences(gradients, again[2]).values()),
    )
    return found


@torch.no_grad()
def _reference(policy: Policy, batch: Microbatch) -> list[bool]:
    """Transformer Engine keeps quantised weights from microbatch to microbatch: other weights must be quantised anew.

    [new weights give other log-probs, the reference's give its own, and then the new ones' come back], of two microbatches.
    """

    def both() -> torch.Tensor:
        return torch.stack(policy.log_probs([batch, batch]))

    before = both()
    policy.take_reference()
    for parameter in policy.chunks[0].parameters():
        parameter.mul_(1.1)
    after = both()
    with policy.as_reference():
        reference = both()
    return [bool((after[0] - before[0]).abs().max() > 1e-3), torch.equal(reference, before), torch.equal(both(), after)]


def unquantised_layers(first: int, last: int) -> list[bool]:
    """Of each layer, whether it gives what the layer without FP8 gives for the same hidden states, but for float32's rounding."""
    from transformer_engine.pytorch import fp8_autocast

    plain = make_trainer("off").policy.chunks[0].decoder.layers
    policy = make_trainer("blockwise", fp8_skip_first_layers=first, fp8_skip_last_layers=last).policy
    same = []

    def compare(number: int, keywords: dict[str, Any], output: torch.Tensor) -> None:
        with fp8_autocast(enabled=False):  # this is called where the layer is
            expected = plain[number](**keywords)[0]
        same.append(bool((output - expected).abs().max() < 1e-5 * expected.abs().max()))

    for number, layer in enumerate(policy.chunks[0].decoder.layers):
        layer.register_forward_hook(
            lambda _layer, _arguments, keywords, output, n=number: compare(n, keywords, output[0]), with_kwargs=True
        )
    policy.log_probs([two_samples(61)])
    return same


def two_ranks(layouts: list[dict[str, int]]) -> list[dict[str, Any]]:
    """This rank's part, by layout and recipe; samples of one token and microbatches without samples among the lengths."""
    groups.init_distributed()
    found = []
    try:
        for sizes in layouts:
            layout = ParallelConfig(**sizes)
            groups.init_parallel(layout, seed=0)
            found.append({recipe: _of_layout(recipe, layout) for recipe in RECIPES})
            groups.destroy_parallel()
        return found
    finally:
        groups.destroy()


def _of_layout(recipe: str, layout: ParallelConfig) -> dict[str, Any]:
    batch = two_samples(61, dictated=True)
    trainer = make_trainer(recipe, layout)
    found = against(step(make_trainer("off", layout), batch), step(trainer, batch))
    unequal = []
    for lengths in ([], [1], [3, 1, 7], [33]):
        old, new, gradients = step(trainer, batch_of(lengths))
        if not torch.equal(old, new) or not all(g.isfinite().all() for g in gradients.values()):
            unequal.append(sum(lengths))
    return found | {"unequal lengths": unequal}
