"""What `r1mega plan --search` looks at: every layout, recomputation and length of microbatches that a config could have."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

from r1mega.config.layout import num_experts
from r1mega.config.model_files import HFConfig
from r1mega.config.schema import MemoryConfig, ParallelConfig, Recompute, RecomputeModule, TrainingStage
from r1mega.config.stages.reward_model import RewardModelStage
from r1mega.config.stages.rl import RLStage
from r1mega.config.stages.sft import SFTStage
from r1mega.config.validate import layout_problems
from r1mega.errors import ConfigError
from r1mega.model.architecture import LatentAttention
from r1mega.model.families import architecture_of

MEMORY = (
    (MemoryConfig(), False),
    (MemoryConfig(grad_offload=True), False),
    (MemoryConfig(grad_offload=True, optimizer_offload="rollout"), False),
    (MemoryConfig(grad_offload=True, optimizer_offload="rollout", param_offload=True), False),
    (MemoryConfig(grad_offload=True, optimizer_offload="update"), False),
    (MemoryConfig(grad_offload=True, optimizer_offload="update", param_offload=True), False),
    (MemoryConfig(grad_offload=True, optimizer_offload="update", param_offload=True, reference_swap=True), False),
    (MemoryConfig(grad_offload=True), True),
    (MemoryConfig(grad_offload=True, param_offload=True), True),
    (MemoryConfig(grad_offload=True, param_offload=True, reference_swap=True), True),
)
"""(memory, optimizer.cpu_offload). The last one without and the last one with it leave the least on the device in any phase."""


def candidates(config: TrainingStage, hf: HFConfig, gpus: int) -> Iterator[TrainingStage]:
    """The config's own; then those that its checks let pass, from those that cut little to those that cut much."""
    if _legal(config, hf, gpus):
        yield config
    recomputed = dict.fromkeys((config.model.recompute, *_recompute(hf)))
    models = [config.model.model_copy(update={"recompute": recompute}) for recompute in recomputed]
    own = _as_laid_out(config.parallel)
    further = architecture_of(hf).num_mtp_layers if config.model.mtp_loss_coefficient > 0 else 0
    for parallel in dict.fromkeys(_layouts(config.parallel, hf, gpus, further)):
        if not _legal(config.model_copy(update={"parallel": parallel}), hf, gpus):
            continue
        for model, tokens in itertools.product(models, capacities(config)):
            if (_as_laid_out(parallel), model, tokens) != (own, config.model, capacity(config)[1]):
                yield with_capacity(config.model_copy(update={"parallel": parallel, "model": model}), tokens)


def memory_choices(config: TrainingStage) -> list[TrainingStage]:
    """The config with what `memory` and optimizer.cpu_offload may be; its own first."""
    found = []
    for memory, cpu in dict.fromkeys(((config.memory, config.optimizer.cpu_offload), *MEMORY)):
        optimizer = config.optimizer.model_copy(update={"cpu_offload": cpu})
        one = config.model_copy(update={"memory": memory, "optimizer": optimizer})
        if next(iter(one.memory_problems()), None) is None:
            found.append(one)
    return found


def _legal(config: TrainingStage, hf: HFConfig, gpus: int) -> bool:
    return next(layout_problems(config, dict(hf), gpus), None) is None


def _as_laid_out(parallel: ParallelConfig) -> ParallelConfig:
    """Equal for layouts that are the same: one chunk a stage is no vpp, and dp follows from the others."""
    return parallel.model_copy(update={"vpp": parallel.vpp if (parallel.vpp or 1) > 1 else None, "dp": None})


def _layouts(own: ParallelConfig, hf: HFConfig, gpus: int, further: int) -> Iterator[ParallelConfig]:
    """further: layers of multi-token prediction, which may be apart from the loss."""
    layers = architecture_of(hf).num_layers
    tps, cps = dict.fromkeys((1, 2, 4, 8, own.tp)), dict.fromkeys((1, 2, 4, 8, own.cp))
    eps = [ep for ep in divisors(num_experts(dict(hf)) or 1) if gpus % ep == 0]
    pps = divisors(gpus)
    for tp, cp, pp, ep, vpp in itertools.product(tps, cps, pps, eps, dict.fromkeys((None, 2, _as_laid_out(own).vpp))):
        if (
            gpus % (tp * cp * pp)
            or gpus % (ep * own.etp * pp)
            or ((vpp or 1) > 1 and pp == 1)
            or pp * (vpp or 1) > layers
        ):
            continue
        stages = [(uneven_stages(layers, pp * (vpp or 1)), False)]
        if (pp, vpp) == (own.pp, _as_laid_out(own).vpp):
            stages.append((own.layers_per_stage, own.mtp_standalone))
        if further and pp > 1:
            stages.append((standalone_stages(layers, further, pp * (vpp or 1)), True))
        for counts, alone in dict.fromkeys(stages):
            update = {"tp": tp, "cp": cp, "pp": pp, "ep": ep, "vpp": vpp, "layers_per_stage": counts, "dp": None}
            yield own.model_copy(update=update | {"mtp_standalone": alone})


def uneven_stages(layers: int, stages: int) -> tuple[int, ...] | None:
    """Decoder layers of each stage; None: equally many. Where they do not divide, the last stage has one less for its output
    layer, and the first, which keeps most activations, is among the shorter ones.
    """
    if layers % stages == 0:
        return None
    least, more = divmod(layers + 1, stages)
    return *[least] * (stages - 1 - more), *[least + 1] * more, least - 1


def standalone_stages(layers: int, further: int, stages: int) -> tuple[int, ...]:
    """Decoder layers of each stage where the last one has the loss alone and the one before it so many layers of multi-token
    prediction: as even as can be with these among them, the first among the shorter ones.
    """
    others = stages - 2
    beside = max(0, (layers + further) // (others + 1) - further) if others else layers
    least, more = divmod(layers - beside, max(1, others))
    return *[least] * (others - more), *[least + 1] * more, beside, 0


def _recompute(hf: HFConfig) -> Iterator[Recompute]:
    """From none to all, for layers that this model has."""
    model = architecture_of(hf)
    latent: tuple[RecomputeModule, ...] = ("mla_up_proj",) if isinstance(model.attention, LatentAttention) else ()
    feed_forward: tuple[RecomputeModule, ...] = ("mlp",) if model.experts is None else ("moe",)
    yield "none"
    yield ("layernorm", *latent)
    yield feed_forward
    yield ("layernorm", *latent, *feed_forward)
    yield "full"


def capacity(config: TrainingStage) -> tuple[int, int]:
    """(tokens of the longest sample, of a pair where they stay together; of a microbatch)."""
    if isinstance(config, RLStage):
        longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
        return longest, config.update.microbatch_tokens
    if isinstance(config, RewardModelStage):
        return config.longest, config.microbatch_tokens
    if isinstance(config, SFTStage):
        return config.data.max_tokens, config.microbatch_tokens
    raise ConfigError(f"stage {config.stage} trains nothing that a search lays out")


def capacities(config: TrainingStage) -> tuple[int, ...]:
    """Of a microbatch: the config's own, one and two of the longest samples."""
    longest, own = capacity(config)
    return tuple(dict.fromkeys((own, longest, 2 * longest)))


def with_capacity(config: TrainingStage, tokens: int) -> TrainingStage:
    """The config with microbatches of so many tokens."""
    if isinstance(config, RLStage):
        return config.model_copy(update={"update": config.update.model_copy(update={"microbatch_tokens": tokens})})
    return config.model_copy(update={"microbatch_tokens": tokens})


def divisors(number: int) -> list[int]:
    """In ascending order."""
    return [size for size in range(1, number + 1) if number % size == 0]


def differences(before: TrainingStage, after: TrainingStage) -> Iterator[str]:
    """Overrides of the command line that make `after` of `before`: keys of the sections that a search changes."""
    for section in ("parallel", "model", "memory", "optimizer", "checkpoint", "rollout", "update"):
        one, other = getattr(before, section, None), getattr(after, section, None)
        if one is None or other is None:
            continue
        old, new = one.model_dump(mode="json"), other.model_dump(mode="json")
        for key in new:
            if new[key] != old[key]:
                yield f"{section}.{key}={_yaml(new[key])}"
    tokens = getattr(after, "microbatch_tokens", None)
    if tokens != getattr(before, "microbatch_tokens", None):
        yield f"microbatch_tokens={tokens}"


def _yaml(value: object) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return value if isinstance(value, str) else json.dumps(value)
