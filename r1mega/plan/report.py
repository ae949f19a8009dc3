"""The report of `r1mega plan`."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from r1mega.config.schema import Stage, TrainingStage
from r1mega.plan.gpu import GPU
from r1mega.plan.memory import MemoryPlan, Verdict
from r1mega.plan.search import Proposal
from r1mega.plan.seconds import Seconds, gpu_hours
from r1mega.plan.workload import Workload

GIGA = 1e9


def verdict(plan: MemoryPlan, gpu: GPU) -> Verdict:
    """Of the whole stage: the worst of its phases and of its nodes; what cannot start does not fit."""
    found = {plan.node, *(phase.verdict(gpu) for phase in plan.phases)}
    if "does not fit" in found or not plan.starts:
        return "does not fit"
    return "at risk" if "at risk" in found else "fits"


def report(
    path: Path, config: Stage, plan: MemoryPlan, gpus: int, gpu: GPU, work: Workload | None, keep: int
) -> Iterable[str]:
    """Lines of text for a person. Sizes in GB of 10^9 bytes."""
    yield f"{path}: stage {config.stage} on {gpus} {gpu.name} of {gpu.memory_bytes / GIGA:.1f} GB"
    if isinstance(config, TrainingStage):
        p = config.parallel
        yield f"layout      tp {p.tp}, pp {p.pp}, vpp {p.vpp or 1}, ep {p.ep}, etp {p.etp}, cp {p.cp}, dp {gpus // (p.tp * p.pp * p.cp)}"
    if work is not None:
        mean = work.tokens / len(work.samples)
        yield (
            f"step        {len(work.samples)} samples of {mean:,.0f} tokens on average, {work.minibatches} optimizer steps of "
            f"{work.microbatches} microbatches a replica, the largest {work.microbatch_tokens:,} tokens"
        )
    yield ""
    yield from _table(plan, gpu)
    yield ""
    yield from _further(plan, keep)
    yield f"verdict     {verdict(plan, gpu)}"
    yield from (f"  {problem}" for problem in plan.problems)


def times(config: Stage, seconds: Seconds | None, gpus: int, gpu: GPU) -> Iterable[str]:
    """Lines on the seconds of a step and the hours of the stage; none for a stage that trains nothing."""
    if seconds is None:
        return
    parts = ", ".join(f"{name} {_short(value)}" for name, value in seconds.phases.items())
    yield ""
    yield f"seconds     {_short(seconds.total)} a step ({parts}), without saves and evaluations"
    if (steps := getattr(config, "steps", None)) is not None:
        yield f"stage       {steps:,} steps: {gpu_hours(seconds.total, steps, gpus):,} GPU hours, {_short(seconds.total * steps / 86400)} days"
    yield (
        f"speed       {_short(seconds.tokens_per_gpu(gpus))} tokens/s/GPU, MFU {_short(100 * seconds.mfu(gpus, gpu))} %; a model, off by "
        "up to 30 % from what tuned programs took (docs/plan.md)"
    )


def proposed(
    path: Path, overrides: Sequence[str], proposals: Sequence[Proposal], gpus: int, gpu: GPU, skipped: int
) -> Iterable[str]:
    """What a search found, the fastest first, each as the words to put behind `r1mega train` or `r1mega plan`. skipped: layouts
    that it did not come to.
    """
    if not proposals:
        yield f"nothing that was measured fits {gpus} {gpu.name}; take more of them, or GPUs with more memory"
    for proposal in proposals:
        phase = proposal.fullest
        yield (
            f"{_short(proposal.seconds)} s a step, fullest in {phase.phase}: {phase.total / GIGA:.1f} of {gpu.memory_bytes / GIGA:.1f} GB"
        )
        yield "  " + shlex.join([str(path), *overrides, *proposal.overrides])
    if skipped:
        yield f"the search was cut off: {skipped:,} more layouts, any of which may be faster, were not measured"


def _short(value: float) -> str:
    """As far as a model of seconds is good for: 1,234, 12.3, 1.2, 0.012."""
    if value >= 10:
        return f"{value:,.{int(value < 100)}f}"
    return f"{value:.2g}" if value >= 0.01 or value == 0 else "< 0.01"


def _table(plan: MemoryPlan, gpu: GPU) -> Iterable[str]:
    names = list(dict.fromkeys(name for phase in plan.phases for name in phase.parts))
    rows: list[Sequence[Any]] = [("GB a GPU", *names, "all", "stage", "")]
    for phase in plan.phases:
        figures = [f"{phase.parts[name] / GIGA:.1f}" if name in phase.parts else "-" for name in names]
        rows.append((phase.phase, *figures, f"{phase.total / GIGA:.1f}", str(phase.stage), phase.verdict(gpu)))
    yield from aligned(rows)


def _further(plan: MemoryPlan, keep: int) -> Iterable[str]:
    for rank in plan.ranks:
        s = rank.memory.static
        yield (
            f"stage {rank.stage:<6}weights {s.weights / GIGA:.2f}, gradients {s.gradients / GIGA:.2f}, optimizer "
            f"{(s.main_params + s.exp_avg + s.exp_avg_sq) / GIGA:.2f} GB; activations of a microbatch "
            f"{sum(a.kept for a in rank.memory.activations) / GIGA:.2f} GB kept, {rank.in_flight:g} at once, and "
            f"{max(a.working for a in rank.memory.activations) / GIGA:.2f} GB at work"
        )
    if plan.generator is not None:
        yield (
            f"generator   KV cache {max(0.0, plan.generator.kv_cache) / GIGA:.1f} GB a GPU: {plan.generator.kv_tokens:,} tokens a "
            f"generator, {plan.generator.kv_bytes_per_token / 1e3:.1f} kB each"
        )
    if plan.host_bytes:
        parts = ", ".join(f"{name} {size / GIGA:,.0f}" for name, size in plan.host_bytes.items())
        yield f"host        {sum(plan.host_bytes.values()) / GIGA:,.0f} GB a node ({parts})"
        yield (
            f"disk        {plan.checkpoint_bytes / GIGA:,.1f} GB a checkpoint, {(keep + 1) * plan.checkpoint_bytes / GIGA:,.1f} "
            f"with {keep} kept and one being written"
        )


def aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """The first and the last column to the left, figures to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(w) if i in (0, len(row) - 1) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
