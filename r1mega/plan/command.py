"""What `r1mega plan` does with its arguments."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from r1mega.config.layout import model_problems, process_problems
from r1mega.config.load import load_config
from r1mega.config.model_files import HFConfig
from r1mega.config.schema import Stage, TrainingStage
from r1mega.errors import ConfigError
from r1mega.plan.given import made_for, on_the_host, read_model
from r1mega.plan.gpu import GPU, NODE_BYTES, Efficiency, gpu_kind

if TYPE_CHECKING:
    from r1mega.plan.calibrate import Calibration
    from r1mega.plan.memory import MemoryPlan
    from r1mega.plan.seconds import Seconds
    from r1mega.plan.workload import Lengths, Workload


@dataclass(frozen=True, slots=True)
class Job:
    """A config on GPUs, as asked on the command line. run: whose measured phases say how efficient they are; node_bytes: host
    memory of a node.
    """

    path: Path
    overrides: list[str]
    gpus: int
    gpu: str
    lengths: Lengths
    imbalance: float
    per_node: int
    lengths_file: Path | None = None
    run: Path | None = None
    node_bytes: float = NODE_BYTES


@dataclass(frozen=True, slots=True)
class Planned:
    """work and seconds: None for a stage that trains nothing."""

    config: Stage
    gpu: GPU
    memory: MemoryPlan
    work: Workload | None
    seconds: Seconds | None
    calibration: Calibration | None

    @property
    def fits(self) -> bool:
        """Or is at risk."""
        from r1mega.plan.report import verdict

        return verdict(self.memory, self.gpu) != "does not fit"


def plan_job(job: Job, given: Stage | None = None, known: Calibration | None = None) -> Planned:
    """given: instead of what job.path says with its overrides; known: of job.run. Raises ConfigError for what cannot be laid
    out.
    """
    on_the_host()
    from r1mega.plan.memory import plan_memory
    from r1mega.plan.seconds import plan_seconds
    from r1mega.plan.workload import replicas_work

    config, gpu, hf, lengths, calibration = _loaded(job, given, known)
    work = replicas_work(config, lengths, job.gpus) if isinstance(config, TrainingStage) else None
    try:
        memory = plan_memory(
            config, hf, job.gpus, gpu, work, imbalance=job.imbalance, per_node=job.per_node, node_bytes=job.node_bytes
        )
    except ConfigError as error:
        further = list(_instead(job, config, hf)) if given is None else []
        raise ConfigError("\n".join([str(error), *further])) from error
    seconds = None
    if isinstance(config, TrainingStage) and work is not None:
        seconds = plan_seconds(
            config, hf, job.gpus, gpu, work, memory.generator, imbalance=job.imbalance, per_node=job.per_node,
            efficiency=Efficiency() if calibration is None else calibration.efficiency, moved=memory.moved_a_token,
        )  # fmt: skip
    return Planned(config, gpu, memory, work, seconds, calibration)


def plan_lines(job: Job) -> tuple[list[str], Planned]:
    """The report, and what it is of."""
    planned = plan_job(job)
    from r1mega.plan.calibrate import lines
    from r1mega.plan.report import report, times

    keep = planned.config.checkpoint.keep if isinstance(planned.config, TrainingStage) else 0
    return [
        *report(job.path, planned.config, planned.memory, job.gpus, planned.gpu, planned.work, keep),
        *times(planned.config, planned.seconds, job.gpus, planned.gpu),
        *lines(planned.calibration, planned.gpu),
    ], planned


def _instead(job: Job, config: Stage, hf: HFConfig) -> Iterator[str]:
    """What to plan where a config cannot be laid out on so many GPUs: one of the stage that is made for them, what a search finds."""
    divided, legal = True, True
    if isinstance(config, TrainingStage):
        divided = not list(process_problems(config.parallel, job.gpus))
        legal = divided and not list(model_problems(config.parallel, hf))
    rollout = getattr(config, "rollout", None)
    divided = divided and (rollout is None or job.gpus % rollout.tp == 0)
    for path in () if divided else made_for(job.path, config.stage, job.gpus):
        yield f"{path} is made for {job.gpus:,} GPUs"
    if isinstance(config, TrainingStage) and not (divided and legal):
        words = shlex.join(["r1mega", "plan", str(job.path), *job.overrides, "--gpus", str(job.gpus), "--search"])
        yield f"`{words}` proposes layouts, if some fit"


def search_lines(job: Job, say: Callable[[str], None]) -> tuple[list[str], bool]:
    """(lines with the best layouts that fit, whether there is one). say: is told of the progress."""
    on_the_host()
    from r1mega.plan.calibrate import lines
    from r1mega.plan.report import proposed
    from r1mega.plan.search import Search

    config, gpu, hf, lengths, calibration = _loaded(job)
    if not isinstance(config, TrainingStage):
        raise ConfigError(f"{job.path}: stage {config.stage} trains nothing: there is no layout to search for")
    search = Search(config, hf, job.gpus, gpu, lengths, job.imbalance, job.per_node, say, node_bytes=job.node_bytes)
    if calibration is not None:
        search.efficiency = calibration.efficiency
    proposals = search.run()
    said = [*proposed(job.path, job.overrides, proposals, job.gpus, gpu, search.skipped), *lines(calibration, gpu)]
    return said, bool(proposals)


def is_pipeline(path: Path) -> bool:
    """Whether a YAML file has `nodes`. A file that cannot be read is none: what loads it says why."""
    try:
        return "nodes" in (yaml.safe_load(path.read_text()) or ())
    except (OSError, yaml.YAMLError, TypeError):
        return False


def sample_counts(given: Sequence[str]) -> dict[str, int]:
    """["sft=800000"] -> {"sft": 800000}. Raises ConfigError for another form."""
    found = {}
    for item in given:
        node, _, count = item.partition("=")
        if not node or not count.isdecimal() or int(count) < 1:
            raise ConfigError(f"--samples {item}: wants a node and a number above 0, as in sft=800000")
        found[node] = int(count)
    return found


def _loaded(
    job: Job, given: Stage | None = None, known: Calibration | None = None
) -> tuple[Stage, GPU, HFConfig, Lengths, Calibration | None]:
    from r1mega.plan.calibrate import calibrated
    from r1mega.plan.memory import SPARE_BYTES
    from r1mega.plan.workload import longest_drawn, read_lengths

    gpu, lengths, per_node = gpu_kind(job.gpu), job.lengths, min(job.per_node, job.gpus)
    if job.node_bytes <= (programs := per_node * SPARE_BYTES):
        raise ConfigError(
            f"--host-memory {job.node_bytes / 1e9:g}: the programs of a node's {per_node} ranks alone are counted with "
            f"{programs / 1e9:g} GB; give all memory of a node"
        )
    config = load_config(job.path, job.overrides) if given is None else given
    if job.lengths_file is not None:
        lengths = dataclasses.replace(lengths, given=read_lengths(job.lengths_file))
    elif given is None and isinstance(config, TrainingStage):  # a recipe has one mean for all nodes
        longest, mean = longest_drawn(config), lengths.mean or 0.0
        if mean > longest:
            raise ConfigError(f"--mean {mean:g}: {job.path} allows {longest:,} tokens at most; give no more than that")
    if known is None and job.run is not None:
        known = calibrated(job.run, gpu, job.per_node, job.imbalance)
    return config, gpu, read_model(config, job.path), lengths, known


def generator_refusals(config: Stage, path: Path, gpus: int, gpu: str) -> list[str]:
    """Why the generator of a stage could not start on these GPUs; nothing where there is none, or no config.json yet."""
    if getattr(config, "rollout", None) is None or config.model.dtype != "bfloat16":
        return []  # float32 is for a CPU, whose memory is another
    from r1mega.plan.generator import generator_memory_problems

    try:
        hf = read_model(config, path)
    except ConfigError:
        return []
    return list(generator_memory_problems(config, hf, gpu_kind(gpu), gpus))
