"""The stages by name: what a config of each may hold. The code that runs them: `r1mega/stages`."""

from __future__ import annotations

from typing import get_args

from r1mega.config.schema import Stage
from r1mega.config.stages.cold_start import ColdStartStage
from r1mega.config.stages.evaluate import EvaluateStage
from r1mega.config.stages.nano_base import NanoBaseStage
from r1mega.config.stages.rejection_sampling import RejectionSamplingStage
from r1mega.config.stages.reward_model import RewardModelStage
from r1mega.config.stages.rl import RLStage
from r1mega.config.stages.sft import DistillStage, SFTStage

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
"""What `stage:` may name."""
