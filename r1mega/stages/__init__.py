"""The stages of the recipe, each a `run(config, runtime) -> exit code`; `run_stage` starts the one a config names."""

from __future__ import annotations

import contextlib

from r1mega.checkpoint.hf import read_config
from r1mega.checkpoint.store import MANIFEST, architecture_of, check_architecture
from r1mega.config.schema import BaseStage, RLStage
from r1mega.observe.run import RunDirectory, run_finished


def run_stage(config: BaseStage | RLStage) -> int:
    """Run one stage to its end, from wherever an earlier start left it; the exit code (85: saved, start again)."""
    from r1mega import platform

    _check_run_directory(config)
    if run_finished(config.run_dir, config.steps):
        print(f"{config.run_dir}: finished before ({config.steps} steps); nothing to do", flush=True)
        return 0
    platform.prepare()  # before megatron is imported
    if isinstance(config, BaseStage):
        from r1mega.stages.base import run
    else:
        from r1mega.stages.rl import run
    from r1mega.stages.runtime import Runtime

    with Runtime.open(config) as runtime:
        return run(config, runtime)


def _check_run_directory(config: BaseStage | RLStage) -> None:
    """Refuse to go on in the directory of another run or another model, before any process group starts."""
    RunDirectory(config.run_dir).check_config(config.model_dump(mode="json"))
    architecture = architecture_of(read_config(config.model.path))
    for manifest in sorted(config.run_dir.glob(f"checkpoints/step_*/{MANIFEST}")):
        with contextlib.suppress(ValueError):  # a damaged manifest is `CheckpointStore.latest`'s business
            check_architecture(manifest.parent, architecture)
