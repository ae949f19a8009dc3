"""The stages by name: what a config of each may hold. The code that runs them: `r1mega/stages`."""

from __future__ import annotations

import sys
from typing import get_args

from r1mega.config.named import load_named
from r1mega.config.schema import Stage
from r1mega.config.stages.cold_start import ColdStartStage
from r1mega.config.stages.evaluate import EvaluateStage
from r1mega.config.stages.nano_base import NanoBaseStage
from r1mega.config.stages.rejection_sampling import RejectionSamplingStage
from r1mega.config.stages.reward_model import RewardModelStage
from r1mega.config.stages.rl import RLStage
from r1mega.config.stages.sft import DistillStage, SFTStage
from r1mega.errors import ConfigError

_MODELS: tuple[type[Stage], ...] = (
    NanoBaseStage,
    RLStage,
    ColdStartStage,
    RejectionSamplingStage,
    SFTStage,
    DistillStage,
    RewardModelStage,
    EvaluateStage,
)

STAGES: dict[str, type[Stage]] = {
    name: model for model in _MODELS for name in get_args(model.model_fields["stage"].annotation)
}
"""What `stage:` may name; beside them `module:Class` of one's own (docs/extending.md)."""


def stage_model(name: object) -> type[Stage]:
    """The config of a stage. ConfigError for one that is not there: neither in `STAGES` nor a `module:Class`."""
    if isinstance(name, str) and name in STAGES:
        return STAGES[name]
    if not (isinstance(name, str) and ":" in name):
        raise ConfigError(f"stage is {name!r}; it must be one of {', '.join(STAGES)}, or module:Class of your own")
    model = load_named(name, f"stage is {name!r}")
    if not (isinstance(model, type) and issubclass(model, Stage)):
        raise ConfigError(f"stage is {name!r}, which is no subclass of r1mega.config.schema.Stage")
    if not callable(getattr(sys.modules[model.__module__], "run", None)):
        raise ConfigError(
            f"stage is {name!r}: {model.__module__} has no function run(config, runtime) beside the class"
        )
    return model
