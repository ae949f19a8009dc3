"""What `r1mega plan` does with its arguments."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1mega.config.load import load_config
from r1mega.config.schema import Stage, TrainingStage
from r1mega.errors import ConfigError
from r1mega.plan.gpu import gpu_kind

if TYPE_CHECKING:
    from r1mega.plan.workload import Lengths


def on_the_host() -> None:
    """Models are built of Megatron's local layers, without memory: on a machine with GPUs as on one without.

    Raises ConfigError in a process that has taken a GPU for its platform.
    """
    import torch

    from r1mega import platform
    from r1mega.platform import megatron_import

    if not megatron_import.is_installed():
        platform.use(platform.Platform("cpu", torch.device("cpu"), "gloo", False, False))
    elif platform.current().name != "cpu":
        raise ConfigError("a plan is made in a process of its own, which uses no GPU: run `r1mega plan`")


def plan_config(
    path: Path,
    overrides: list[str],
    *,
    gpus: int,
    gpu: str,
    lengths: Lengths,
    lengths_file: Path | None,
    imbalance: float,
    per_node: int,
) -> tuple[list[str], bool]:
    """(lines of the report, whether it fits). Raises ConfigError for what cannot be laid out."""
    on_the_host()
    from r1mega.plan.memory import plan_memory
    from r1mega.plan.report import report, times, verdict
    from r1mega.plan.seconds import plan_seconds
    from r1mega.plan.workload import read_lengths, workload

    config, kind = load_config(path, overrides), gpu_kind(gpu)
    hf = read_model(config, path)
    if lengths_file is not None:
        lengths = dataclasses.replace(lengths, given=read_lengths(lengths_file))
    work, keep = None, 0
    if isinstance(config, TrainingStage):
        p = config.parallel
        multiple = p.pp if (p.vpp or 1) > 1 else 1
        work = workload(config, lengths, max(1, gpus // (p.tp * p.pp * p.cp)), multiple)
        keep = config.checkpoint.keep
    plan = plan_memory(config, hf, gpus, kind, work, imbalance=imbalance, per_node=per_node)
    seconds = None
    if isinstance(config, TrainingStage) and work is not None:
        seconds = plan_seconds(
            config, hf, gpus, kind, work, plan.generator, imbalance=imbalance, per_node=per_node
        )  # fmt: skip
    return [*report(path, config, plan, gpus, kind, work, keep), *times(config, seconds, gpus, kind)], verdict(
        plan, kind
    ) != "does not fit"


def search_config(
    path: Path,
    overrides: list[str],
    *,
    gpus: int,
    gpu: str,
    lengths: Lengths,
    lengths_file: Path | None,
    imbalance: float,
    per_node: int,
    say: Callable[[str], None],
) -> tuple[list[str], bool]:
    """(lines with the best layouts that fit, whether there is one). say: is told of the progress."""
    on_the_host()
    from r1mega.plan.report import proposed
    from r1mega.plan.search import Search
    from r1mega.plan.workload import read_lengths

    config, kind = load_config(path, overrides), gpu_kind(gpu)
    if not isinstance(config, TrainingStage):
        raise ConfigError(f"{path}: stage {config.stage} trains nothing: there is no layout to search for")
    if lengths_file is not None:
        lengths = dataclasses.replace(lengths, given=read_lengths(lengths_file))
    search = Search(config, read_model(config, path), gpus, kind, lengths, imbalance, per_node, say)
    proposals = search.run()
    return list(proposed(path, overrides, proposals, gpus, kind)), bool(proposals)


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


def read_model(config: Stage, path: Path) -> dict[str, Any]:
    """config.json of the model, or while it has not been downloaded of the `model` directory beside the YAML file (a
    student's: `student`). Raises ConfigError when there is none.
    """
    names = ("student", "model") if config.stage == "distill" else ("model",)
    places = [config.model.path / "config.json", *(path.parent / name / "config.json" for name in names)]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ConfigError(f"model.path = {config.model.path}: {' and '.join(map(str, places))} are missing")
    try:
        return json.loads(found.read_text())
    except ValueError as error:
        raise ConfigError(f"{found}: not JSON ({error})") from error
