"""What of the trainer and of the generator is where in each phase of a step."""

from __future__ import annotations

from r1mega.config.schema import TrainingStage
from r1mega.config.stages.rl import RLStage
from r1mega.train.phases import Part, Phase, PhasePlan, plan_phases

TRAINER: tuple[Part, ...] = ("weights", "gradients", "main_params", "exp_avg", "exp_avg_sq")


def residency(config: TrainingStage) -> tuple[PhasePlan, tuple[Phase, ...]]:
    """(the place of every part in every phase; the phases that a step of this config has, in their order)."""
    cpu_adam = config.optimizer.cpu_offload
    if not isinstance(config, RLStage):
        return plan_phases(config.memory, cpu_adam=cpu_adam), ("update", "step", "save")
    models = (config.reward.helpfulness, config.reward.harmlessness)
    scores = any(part.weight > 0 and part.backend == "megatron" for part in models)
    plan = plan_phases(config.memory, sleep=config.rollout.sleep, cpu_adam=cpu_adam, scores=scores)
    asked = {"score": scores, "reference": config.algorithm.kl_coefficient > 0}
    phases: tuple[Phase, ...] = ("rollout", "score", "logprob", "reference", "update", "step", "reshard", "save")
    return plan, tuple(phase for phase in phases if asked.get(phase, True))
