"""A checkpoint to evaluate: where its HF directory is, and how the run that wrote it posed its prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from r1mega.checkpoint.hf import HFTensors, read_config, tied_head_problems, weights_dtype
from r1mega.config import model_files
from r1mega.config.rewards import RewardConfig
from r1mega.config.schema import Dtype
from r1mega.errors import CheckpointError, ConfigError

DEFAULT_STOP = ("</answer>",)


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """An HF directory, and how the run that wrote it (if any) posed its prompts and scored them."""

    path: Path
    template: str = "r1_zero"
    stop: tuple[str, ...] = DEFAULT_STOP
    max_tokens: int | None = None
    reward: RewardConfig = RewardConfig()


def find_checkpoint(checkpoint: Path) -> CheckpointSource:
    """Resolve an HF directory, a run directory (its export RUN_DIR/hf) or RUN_DIR/checkpoints/step_x (its hf/).

    Template, stops, response length and rewards come from the run's config.yaml where there is one. CheckpointError
    when there is no HF export, or one with two heads of which one would be thrown away.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint}: no such directory; give an HF directory or a run directory")
    path = checkpoint if (checkpoint / "config.json").exists() else checkpoint / "hf"
    if not (path / "config.json").exists():
        raise CheckpointError(
            f"{checkpoint}: neither an HF directory (config.json) nor one with an export (hf/config.json); a run "
            "writes its export when it finishes"
        )
    if read_config(path).get("tie_word_embeddings") and (problems := tied_head_problems(HFTensors(path))):
        raise CheckpointError(f"{path}: {problems[0]}")
    resolved = path.resolve()
    for parent in (resolved, *list(resolved.parents)[:3]):  # RUN/checkpoints/step_x/hf is the deepest
        if (parent / "config.yaml").is_file():
            return _with_run_config(path, parent / "config.yaml")
    return CheckpointSource(path)


def _with_run_config(path: Path, config_file: Path) -> CheckpointSource:
    try:
        run: Mapping[str, Any] = yaml.safe_load(config_file.read_text())
        rollout, data = run.get("rollout", {}), run.get("data", {})
        return CheckpointSource(
            path,
            template=data.get("template", "nano" if run.get("stage") == "base" else "r1_zero"),
            stop=tuple(rollout.get("stop", DEFAULT_STOP)),
            max_tokens=rollout.get("max_response_tokens"),
            reward=RewardConfig.model_validate(run.get("reward", {})),
        )
    except (yaml.YAMLError, AttributeError, TypeError, ValidationError) as error:
        raise ConfigError(f"{config_file}: not the config of a run ({error})") from error


def context_length(path: Path) -> int:
    """Tokens that the model of an HF directory can attend to. CheckpointError when its config does not say."""
    context = model_files.context_length(read_config(path))
    if not isinstance(context, int):
        raise CheckpointError(f"{path}/config.json: max_position_embeddings is missing: the context length is unknown")
    return context


def checkpoint_dtype(path: Path) -> Dtype:
    """What the generator computes in: what the weights are converted to."""
    return "float32" if weights_dtype(read_config(path), HFTensors(path)) == torch.float32 else "bfloat16"


def checkpoint_names(paths: Sequence[Path]) -> list[str]:
    """Short names, one a checkpoint: the run's directory; with its parents' as far as they are needed to tell them
    apart. ConfigError when a checkpoint is named twice.
    """
    parts = [[part for part in path.resolve().parts[1:] if part not in ("hf", "checkpoints")] for path in paths]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["-".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"the same checkpoint is named twice: {', '.join(map(str, paths))}")
