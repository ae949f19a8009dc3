"""The stages of the recipe, each a module with `run(config, runtime) -> exit code`; `run_stage` starts the one a config
names. What their configs hold: `r1mega/config/stages`.
"""

from __future__ import annotations

import importlib
import logging

from r1mega.checkpoint.hf import read_config
from r1mega.checkpoint.manifest import MANIFEST, read_manifest
from r1mega.checkpoint.store import check_architecture, checkpoints, deciding_keys
from r1mega.config.rewards import RewardConfig
from r1mega.config.schema import Stage, TrainingStage
from r1mega.config.stages.reward_model import RewardModelStage
from r1mega.config.stages.rl import RLStage
from r1mega.errors import CheckpointError, ConfigError
from r1mega.loading import uncollected
from r1mega.observe.progress import tell
from r1mega.observe.run import RunDirectory
from r1mega.reward.custom import load_part

logger = logging.getLogger(__name__)

MODULES = {
    "base": "r1mega.stages.nano_base",
    "zero": "r1mega.stages.rl",
    "cold_start": "r1mega.stages.cold_start",
    "reasoning_rl": "r1mega.stages.rl",
    "rejection_sampling": "r1mega.stages.rejection_sampling",
    "sft": "r1mega.stages.sft",
    "distill": "r1mega.stages.sft",
    "reward_model": "r1mega.stages.reward_model",
    "align": "r1mega.stages.rl",
    "evaluate": "r1mega.stages.evaluate",
}
"""Where each stage's `run` is; that of a stage of one's own is beside its config's class."""


def run_stage(config: Stage) -> int:
    """Run one stage to its end, from wherever an earlier start left it; the exit code (85: saved, start again)."""
    from r1mega import platform

    check_run_directory(config)
    if is_finished(config):
        tell(f"{config.run_dir}: finished before; nothing to do")
        return 0
    check_model(config)
    platform.prepare()  # before megatron is imported
    check_rewards(config)
    with uncollected():
        from r1mega.platform import groups
        from r1mega.stages.runtime import Runtime, Stopped

        run = importlib.import_module(MODULES.get(config.stage, type(config).__module__)).run
    with groups.peers_named(), Runtime.open(config) as runtime:
        try:
            return run(config, runtime)
        except Stopped as stop:
            return runtime.stopped(stop.step)


def is_finished(config: Stage) -> bool:
    """Whether the run directory holds all that this config asks for."""
    directory = RunDirectory(config.run_dir)
    if not directory.status.exists() or not all((directory.path / name).exists() for name in config.outputs):
        return False
    status = directory.read_status()
    return status["state"] == "finished" and config.is_finished_at(status["step"])


def check_model(config: Stage) -> None:
    """Refuse a model that could not be built, or weights of another one, before any process group starts.

    Raises ConfigError, PlatformError, CheckpointError.
    """
    from r1mega.checkpoint import to_megatron
    from r1mega.model import build

    directory, hf = config.model.path, read_config(config.model.path)
    build.family_of(hf)
    classifies = (hf.get("architectures") or [""])[0].endswith("ForSequenceClassification")
    # a reward model may go on from one, which has no output layer: its own loading tells what does not fit
    is_read = getattr(config, "init_std", None) is None and not (isinstance(config, RewardModelStage) and classifies)
    if is_read and (any(directory.glob("*.safetensors")) or (directory / MANIFEST).exists()):
        num_mtp = (hf.get("num_nextn_predict_layers") or 0) if config.model.mtp_loss_coefficient > 0 else 0
        to_megatron.check_weights(directory, num_mtp)
        if config.model.dtype == "bfloat16" and hf.get("torch_dtype", hf.get("dtype")) == "float16":
            logger.warning("%s: its float16 weights are rounded to bfloat16; model.dtype=float32 keeps them", directory)
    if isinstance(config, TrainingStage):
        build.check_model(hf, config.parallel, config.model)


def check_rewards(config: Stage) -> None:
    """Refuse parts of a reward that cannot be made, or not for this run, before any process group starts. Raises ConfigError."""
    if not isinstance(reward := getattr(config, "reward", None), RewardConfig):
        return
    reads_early = (
        isinstance(config, RLStage) and config.rollout.partial.is_on and config.algorithm.dynamic_sampling.enabled
    )
    for name, section in reward.custom.items():
        part = load_part(name, section)
        part.close()
        if reads_early and part.waits_for_flush and section.weight > 0:
            raise ConfigError(
                f"reward.custom.{name}.part = {section.part} has flush(), which is called once all responses are there, and "
                "rollout.partial with algorithm.dynamic_sampling wants rewards before; switch one of them off, or write the part "
                "without flush()"
            )


def check_run_directory(config: Stage) -> None:
    """Refuse to go on in the directory of another run or model, before any process group starts. Reads small files only: every
    rank does it (of the inputs' contents, `check_inputs` tells on rank 0).
    """
    directory = RunDirectory(config.run_dir)
    directory.check_place()
    directory.check_config(config.model_dump(mode="json"))
    architecture = deciding_keys(read_config(config.model.path))
    for checkpoint in checkpoints(config.run_dir / "checkpoints"):
        try:
            read_manifest(checkpoint)
        except CheckpointError:  # a damaged one is `CheckpointStore.latest`'s business
            continue
        check_architecture(checkpoint, architecture)
