"""What the planner says of every shipped config for GPUs: the table of docs/plan.md.

    python tools/plan_configs.py [--write | --search] [CONFIG ...]

Each of these files says in a comment for how many GPUs and which lengths it is made and what the planner finds:

    # r1mega plan --gpus 512 --mean 9000: rollout 78.9 GB, update 56.7 GB, step 55.4 GB; fits

--write puts the figures after the options. --search prints another table: the seconds of a step of each config that trains, and
of the best that `r1mega plan --search` finds. tests/unit/plan/test_configs.py holds comments and table against the planner.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from r1mega.config.load import load_config
from r1mega.config.schema import TrainingStage
from r1mega.plan.command import Job, plan_job
from r1mega.plan.given import on_the_host, read_model
from r1mega.plan.gpu import gpu_kind
from r1mega.plan.memory import MemoryPlan
from r1mega.plan.report import verdict
from r1mega.plan.search import Search
from r1mega.plan.workload import Lengths

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
    plan: MemoryPlan

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
    """The plans of these files, or of all that have a comment."""
    for job, figures in jobs(paths):
        yield Row(job.path, job.gpus, mean_of(job), figures, plan_job(job).memory)


def jobs(paths: Iterable[Path] = ()) -> Iterator[tuple[Job, str]]:
    """(what is asked of the planner, what the file states) of these files, or of all that have a comment."""
    for path in paths or sorted(CONFIGS.glob("*/*.yaml")):
        if (said := stated(path)) is not None:
            gpus, mean, figures = said
            yield Job(path, [], gpus, GPU.name, Lengths(mean), IMBALANCE, per_node=8), figures


def mean_of(job: Job) -> int | None:
    """As it is stated."""
    return None if job.lengths.mean is None else int(job.lengths.mean)


@dataclass(frozen=True, slots=True)
class Found:
    """Seconds of a step: of the config, and of the best that a search proposes with these words; took: processor seconds."""

    job: Job
    own: float
    best: float | None
    words: str
    took: float


def found(job: Job) -> Found | None:
    """None for a stage that trains nothing."""
    on_the_host()
    config = load_config(job.path)
    if not isinstance(config, TrainingStage):
        return None
    hf = read_model(config, job.path)
    start = time.process_time()
    search = Search(
        config, hf, job.gpus, GPU, job.lengths, job.imbalance, job.per_node, lambda line: print(line, file=sys.stderr)
    )
    proposals = search.run()
    took, seconds = time.process_time() - start, plan_job(job).seconds
    assert seconds is not None
    own = seconds.total
    if not proposals:
        return Found(job, own, None, "", took)
    return Found(job, own, proposals[0].seconds, " ".join(proposals[0].overrides), took)


def search_table(searched: Iterable[Found]) -> Iterator[str]:
    """Lines of Markdown."""
    yield "| config | H100 | mean | shipped, s a step | found | CPU seconds | what it changes |"
    yield "|---|---|---|---|---|---|---|"
    for one in searched:
        name, mean = (
            one.job.path.relative_to(CONFIGS),
            "" if one.job.lengths.mean is None else f"{one.job.lengths.mean:,.0f}",
        )
        own, best = ("nothing" if value is None else f"{value:,.{int(value < 100)}f}" for value in (one.own, one.best))
        yield f"| {name} | {one.job.gpus:,} | {mean} | {own} | {best} | {one.took:,.0f} | `{one.words}` |"


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
    parser.add_argument("--search", action="store_true")
    asked = parser.parse_args()
    paths = [path.resolve() for path in asked.configs]
    if asked.search:
        for line in search_table(one for job, _ in jobs(paths) if (one := found(job)) is not None):
            print(line, flush=True)
        return
    planned = []
    for row in rows(paths):
        planned.append(row)
        if asked.write:
            write(row)
    print("\n".join(table(planned)))


if __name__ == "__main__":
    main()
