"""The stages of the recipe, each a `run(config, runtime) -> exit code`; `run_stage` starts the one a config names."""

from __future__ import annotations

from r1mega.config.schema import BaseStage, RLStage


def run_stage(config: BaseStage | RLStage) -> int:
    """Run one stage to its end, from wherever an earlier start left it; the exit code (85: saved, start again)."""
    from r1mega import platform

    platform.prepare()  # before megatron is imported
    if isinstance(config, BaseStage):
        from r1mega.stages.base import run
    else:
        from r1mega.stages.rl import run
    from r1mega.stages.runtime import Runtime

    with Runtime.open(config) as runtime:
        return run(config, runtime)
