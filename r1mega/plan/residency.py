"""What of the trainer and of the generator is where in each phase of a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from r1mega.config.schema import Stage
from r1mega.config.stages.rl import RLStage

Phase = Literal["rollout", "score", "logprob", "reference", "update", "reshard", "save"]
Part = Literal[
    "weights", "gradients", "main_params", "exp_avg", "exp_avg_sq", "reference", "generator_weights", "kv_cache"
]
Place = Literal["device", "host", "dropped"]

TRAINER: tuple[Part, ...] = ("weights", "gradients", "main_params", "exp_avg", "exp_avg_sq")


def residency(config: Stage) -> dict[Phase, Mapping[Part, Place]]:
    """The phases of a stage of this config, in their order, and the place of every part in each.

    The trainer stays on the device. The generator has lost its weights and its KV cache from the end of a rollout until new
    weights arrive, and is awake while reward models score and while a checkpoint is written. The reference's weights are in
    host memory, and on the device beside the trainer's while they are asked.
    """
    if not isinstance(config, RLStage):
        return {"update": _places(awake=None), "save": _places(awake=None)}
    sleeps = config.rollout.sleep
    awake, asleep = _places(awake=True), _places(awake=not sleeps)
    plan: dict[Phase, Mapping[Part, Place]] = {"rollout": awake}
    models = (config.reward.helpfulness, config.reward.harmlessness)
    if any(part.weight > 0 and part.backend == "megatron" for part in models):
        plan["score"] = awake
    plan["logprob"] = asleep
    if config.algorithm.kl_coefficient > 0:
        plan["reference"] = {**asleep, "reference": "device"}
    plan["update"] = asleep
    plan["reshard"] = {**asleep, "generator_weights": "device"}
    plan["save"] = awake
    return plan


def _places(*, awake: bool | None) -> dict[Part, Place]:
    places: dict[Part, Place] = dict.fromkeys(TRAINER, "device")
    if awake is not None:
        generator: Place = "device" if awake else "dropped"
        places |= {"reference": "host", "generator_weights": generator, "kv_cache": generator}
    return places
