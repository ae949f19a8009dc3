"""What the planner says of every shipped config for GPUs: the table of docs/plan.md.

    python tools/plan_configs.py [--write] [CONFIG ...]

Each of these files says in a comment for how many GPUs and which lengths it is made and what the planner finds:

    # r1mega plan --gpus 512 --mean 9000: rollout 78.9 GB, update 51.2 GB, step 31.2 GB; fits

--write puts the figures after the options. tests/unit/plan/test_configs.py holds comments and table against the planner.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from r1mega.config.load import load_config
from r1mega.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, TrainingStage
from r1mega.plan import memory
from r1mega.plan.command import on_the_host, read_model
from r1mega.plan.gpu import gpu_kind
from r1mega.plan.rank import RankMemory, measure
from r1mega.plan.report import verdict
from r1mega.plan.workload import Lengths, workload

CONFIGS = Path(__file__).parents[1] / "configs"
LINE = re.compile(r"^# r1mega plan --gpus (\d+)(?: --mean (\d+))?:(.*)$", re.M)
SHOWN = ("rollout", "update", "step")
GPU = gpu_kind("h100-80")
IMBALANCE = 1.5


@dataclass(frozen=True, slots=True)
class Row:
    """mean: tokens of a response, None for a quarter of the longest; stated: what the file says of the plan."""

    path: Path
    gpus: int
    mean: int | None
    stated: str
    plan: memory.MemoryPlan

    @property
    def figures(self) -> str:
        """As the file's comment gives them."""
        totals = {phase.phase: phase.total for phase in self.plan.phases}
        parts = (f"{name} {totals[name] / 1e9:.1f} GB" for name in SHOWN if name in totals)
        return f"{', '.join(parts)}; {verdict(self.plan, GPU)}"


def stated(path: Path) -> tuple[int, int | None, str] | None:
    """(GPUs, mean, figures) of the file's comment; None where it has none."""
    found = LINE.search(path.read_text())
    return found and (int(found[1]), int(found[2]) if found[2] else None, found[3].strip())


def rows(paths: Iterable[Path] = ()) -> Iterator[Row]:
    """The plans of these files, or of all that have a comment. Equal ranks are measured once."""
    on_the_host()
    for path in paths or sorted(CONFIGS.glob("*/*.yaml")):
        if (said := stated(path)) is None:
            continue
        gpus, mean, figures = said
        config, work = load_config(path), None
        if isinstance(config, TrainingStage):
            p = config.parallel
            multiple = p.pp if (p.vpp or 1) > 1 else 1
            work = workload(config, Lengths(mean), gpus // (p.tp * p.pp * p.cp), multiple)
        with mock.patch.object(memory, "measure", measured_once):
            plan = memory.plan_memory(
                config, read_model(config, path), gpus, GPU, work, imbalance=IMBALANCE, per_node=8
            )  # fmt: skip
        yield Row(path, gpus, mean, figures, plan)


def measured_once(
    hf: Mapping[str, object],
    model: ModelConfig,
    parallel: ParallelConfig,
    optimizer: OptimizerConfig,
    *,
    world: int,
    rank: int,
    imbalance: float,
    tokens: int,
) -> RankMemory:
    """`plan.rank.measure`, once for all that differs in nothing that takes memory."""
    anywhere = model.model_copy(update={"path": Path()})
    return _measured(json.dumps(hf), anywhere, parallel, optimizer, world, rank, imbalance, tokens)


@functools.cache
def _measured(
    hf: str,
    model: ModelConfig,
    parallel: ParallelConfig,
    optimizer: OptimizerConfig,
    world: int,
    rank: int,
    imbalance: float,
    tokens: int,
) -> RankMemory:
    return measure(
        json.loads(hf), model, parallel, optimizer, world=world, rank=rank, imbalance=imbalance, tokens=tokens
    )  # fmt: skip


def table(found: Iterable[Row]) -> list[str]:
    """Lines of Markdown."""
    lines = ["| config | H100 | mean | fullest phase | GB a GPU | | KV tokens a generator | host GB a node |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in found:
        full = max(row.plan.phases, key=lambda phase: phase.total)
        kv = "" if row.plan.generator is None else f"{row.plan.generator.kv_tokens:,}"
        host = f"{sum(row.plan.host_bytes.values()) / 1e9:,.0f}" if row.plan.host_bytes else ""
        name, mean = row.path.relative_to(CONFIGS), "" if row.mean is None else f"{row.mean:,}"
        lines.append(
            f"| {name} | {row.gpus:,} | {mean} | {full.phase} | {full.total / 1e9:.1f} | {verdict(row.plan, GPU)} | {kv} | {host} |"
        )
    return lines


def write(row: Row) -> None:
    """The figures into the file's comment."""
    text = row.path.read_text()
    row.path.write_text(LINE.sub(lambda found: f"{found[0][: found.start(3) - found.start()]} {row.figures}", text))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("configs", nargs="*", type=Path)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    found = []
    for row in rows([path.resolve() for path in asked.configs]):
        found.append(row)
        if asked.write:
            write(row)
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
