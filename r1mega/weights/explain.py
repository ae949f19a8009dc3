"""What a reshard will move, and how long that takes at a stated bandwidth: the plan, added up. One CPU, no processes.

Everything but the seconds is counted on the plan that a run executes. The seconds are a model: every rank sends and
receives at once at the full stated bandwidth, links inside of a node and between nodes work side by side, nothing is
lost to latency, packing or the generator's own processing of its weights.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from r1mega.config.layout import model_problems, mtp_stage, process_problems
from r1mega.config.model_files import HFConfig
from r1mega.config.stages.rl import RLStage
from r1mega.errors import ConfigError
from r1mega.weights.plan import GeneratorLayout, Plan
from r1mega.weights.trainer_layout import TrainerLayout, pipeline_stages

GIGA = 1e9


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bytes a second and rank, in each direction: between nodes, and inside of a node."""

    between_nodes: float
    inside_node: float


@dataclass(frozen=True, slots=True)
class Summary:
    """Sums over a plan. kept: [ranks] bytes copied without communication; sent, received: [2, ranks] bytes inside of a
    node (0) and between nodes (1); pairs: [ranks, ranks] bytes from source to target; peak_buffer_bytes: of the fullest
    rank, sending and receiving buffers of two buckets at once; seconds: (if no rank ever waits for another, if every
    bucket waits for its slowest rank)."""

    kept: np.ndarray
    sent: np.ndarray
    received: np.ndarray
    pairs: np.ndarray
    num_buckets: int
    peak_buffer_bytes: int
    seconds: tuple[float, float]

    @property
    def fan_in(self) -> np.ndarray:
        """[ranks] from how many others a rank receives."""
        return (self.pairs > 0).sum(axis=0)

    @property
    def fan_out(self) -> np.ndarray:
        return (self.pairs > 0).sum(axis=1)


def summarize(plan: Plan, bandwidth: Bandwidth) -> Summary:
    """Walks through the plan once; memory: one table of ranks x ranks."""
    world, per_node = plan.trainer.world, plan.ranks_per_node
    kept, pairs = np.zeros(world, dtype=np.int64), np.zeros((world, world), dtype=np.int64)
    speeds = np.array([[bandwidth.inside_node], [bandwidth.between_nodes]])
    sent, received = np.zeros((2, world), dtype=np.int64), np.zeros((2, world), dtype=np.int64)
    before = np.zeros(world, dtype=np.int64)  # staged for the bucket before
    bucket_sent, bucket_received = sent.copy(), received.copy()
    bucket = num_buckets = peak = 0
    slowest = 0.0

    def close() -> None:
        nonlocal peak, slowest, before, num_buckets
        staged = (bucket_sent + bucket_received).sum(axis=0)
        peak = max(peak, int((staged + before).max()))
        slowest += float(np.maximum(bucket_sent / speeds, bucket_received / speeds).max())
        num_buckets += bool(staged.any())
        before = staged
        for total, part in ((sent, bucket_sent), (received, bucket_received)):
            total += part
            part[:] = 0

    for route in plan.routes():
        if route.bucket != bucket:
            close()
            bucket = route.bucket
        moving = route.sources != route.targets
        kept[route.targets[~moving]] += route.num_bytes
        sources, targets = route.sources[moving], route.targets[moving]
        link = (sources // per_node != targets // per_node).astype(np.int64)
        pairs[sources, targets] += route.num_bytes
        bucket_received[link, targets] += route.num_bytes
        np.add.at(bucket_sent, (link, sources), route.num_bytes)  # a source may serve several targets
    close()
    return Summary(
        kept,
        sent,
        received,
        pairs,
        num_buckets,
        peak,
        (float(np.maximum(sent / speeds, received / speeds).max()), slowest),
    )


def layouts(
    config: RLStage, hf: HFConfig, world: int | None, fp8: bool = False
) -> tuple[TrainerLayout, GeneratorLayout]:
    """Of a stage's config. world: None: the smallest that fits. Raises ConfigError when a number does not divide."""
    rollout, p = config.rollout, config.parallel
    tp, ep = rollout.tp, rollout.ep
    if world is None:
        world = math.lcm(p.tp * p.pp * p.cp * (p.dp or 1), p.ep * p.etp * p.pp, max(tp, ep), tp * (rollout.dp or 1))
    problems = [*model_problems(p, hf), *process_problems(p, world)]
    if rollout.dp is not None and rollout.dp * tp != world:
        problems.append(
            f"rollout.dp = {rollout.dp} with rollout.tp = {tp} wants {rollout.dp * tp} processes, not {world}"
        )
    if problems:
        raise ConfigError("\n".join(problems))
    builds_mtp = bool(hf.get("num_nextn_predict_layers")) and config.model.mtp_loss_coefficient > 0
    trainer = TrainerLayout(
        world,
        p.tp,
        p.ep,
        p.etp,
        p.pp,
        p.cp,
        pipeline_stages(p, hf["num_hidden_layers"]),
        bool(hf.get("tie_word_embeddings")),
        mtp_stage(p) % p.pp if builds_mtp else None,
    )
    return trainer, GeneratorLayout(world, tp, ep, fp8)


def explain(
    config_path: Path, overrides: list[str], *, world: int | None, bandwidth: Bandwidth, ranks_per_node: int, fp8: bool
) -> str:
    """The report of `r1mega reshard explain`. Raises ConfigError for what cannot be laid out."""
    from r1mega.config.load import load_config

    config = load_config(config_path, overrides)
    if not isinstance(config, RLStage):
        raise ConfigError(f"stage {config.stage} is no RLStage, which has a generator to update; take an RL config")
    path, hf = read_sizes(config.model.path, config_path)
    trainer, generator = layouts(config, hf, world, fp8 or config.rollout.quantization == "fp8")
    start = time.perf_counter()
    plan = Plan(
        hf,
        trainer,
        generator,
        model_dtype=getattr(torch, config.model.dtype),
        bucket_bytes=config.weights.bucket_bytes,
        ranks_per_node=ranks_per_node,
    )
    summary = summarize(plan, bandwidth)
    return f"{'model':<28}{path}\n" + format_summary(plan, summary, bandwidth, time.perf_counter() - start)


def read_sizes(model: Path, config_path: Path) -> tuple[Path, dict[str, Any]]:
    """(which file, config.json) of the model; while it has not been downloaded, of the `model` directory beside the
    YAML file, where the shipped configs keep what is published. Raises ConfigError when there is neither."""
    places = [model / "config.json", config_path.parent / "model" / "config.json"]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise ConfigError(f"model.path = {model}: {places[0]} is missing, and so is {places[1]}")
    try:
        return path, json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error})") from error


def format_summary(plan: Plan, summary: Summary, bandwidth: Bandwidth, plan_seconds: float) -> str:
    """Lines of text for a person."""
    t, g, world = plan.trainer, plan.generator, plan.trainer.world
    nodes = -(-world // plan.ranks_per_node)
    crossing, between = summary.received, summary.received[1]
    largest = np.unravel_index(int(summary.pairs.argmax()), summary.pairs.shape)
    low, high = summary.seconds
    experts = f"whole experts over ep {g.ep}" if g.ep > 1 else "experts cut by tp"
    if g.ep > g.tp:
        experts += f", {g.ep // g.tp} generators share them"
    rows = [
        ("ranks", f"{world} on {nodes} nodes of {min(plan.ranks_per_node, world)}"),
        ("trainer", f"tp {t.tp}, pp {t.pp}, cp {t.cp}, dp {world // (t.tp * t.pp * t.cp)}; experts: ep {t.ep}, "
                    f"etp {t.etp}, {world // (t.ep * t.etp * t.pp)} replicas"),
        ("generator", f"{world // g.tp} x (tp {g.tp}, {experts}){', block FP8' if g.fp8 else ''}"),
        ("", ""),
        ("a rank", "least / mean / most"),
        ("  keeps (no communication)", _spread_of(summary.kept)),
        ("  receives", _spread_of(crossing.sum(axis=0))),
        ("    inside the node", _spread_of(crossing[0])),
        ("    from other nodes", _spread_of(between)),
        ("  sends", _spread_of(summary.sent.sum(axis=0))),
        ("  fan-in, ranks", _counts_of(summary.fan_in)),
        ("  fan-out, ranks", _counts_of(summary.fan_out)),
        ("", ""),
        ("all ranks", ""),
        ("  moved, the lower bound", f"{_bytes(int(crossing.sum()))}: {_bytes(int(crossing[0].sum()))} inside nodes, "
                                     f"{_bytes(int(between.sum()))} between nodes"),
        ("  busiest link", f"{_bytes(int(summary.pairs.max()))}, rank {largest[0]} to {largest[1]}"),
        ("  buckets", f"{summary.num_buckets} of at most {_bytes(plan.bucket_bytes)} a rank and direction"),
        ("  peak buffers of a rank", f"{_bytes(summary.peak_buffer_bytes)} (two buckets, sent and received)"),
        ("  predicted", f"{low:.3f} s if no rank waits, {high:.3f} s bucket by bucket, at "
                        f"{bandwidth.between_nodes / GIGA:g} GB/s between nodes and "
                        f"{bandwidth.inside_node / GIGA:g} GB/s inside, a rank and direction"),
        ("  planned in", f"{plan_seconds:.1f} s"),
    ]  # fmt: skip
    return "\n".join(f"{name:<28}{text}".rstrip() for name, text in rows)


def _spread_of(values: np.ndarray) -> str:
    return " / ".join(_bytes(value) for value in (int(values.min()), float(values.mean()), int(values.max())))


def _counts_of(values: np.ndarray) -> str:
    return f"{values.min()} / {values.mean():.1f} / {values.max()}"


def _bytes(value: float) -> str:
    """Decimal units, as bandwidths are stated in."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f} B"
