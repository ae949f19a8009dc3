"""Whether a parallel layout fits a number of processes and a model. Pure: no processes, no heavy imports."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Protocol

from r1mega.config.model_files import HFConfig

VOCABULARY_PADDING = 64
"""vLLM pads the vocabulary to a multiple of it (vocab_parallel_embedding.py, DEFAULT_VOCAB_PADDING_SIZE)."""

GENERATED_MODEL_TYPES = ("deepseek_v3", "kimi_k2", "llama", "qwen2", "qwen3", "qwen3_moe")
"""Models whose parameters in the generator are known (weights/layout.py): of the trained ones (model/families) all but one."""

EXPERT_KEYS = ("n_routed_experts", "num_experts", "num_local_experts")
"""Keys of a config.json that say how many routed experts a layer has; each family has one of them."""


NOT_BUILT = (
    "parallel.mtp_standalone: model.mtp_loss_coefficient = 0 builds no layers of multi-token prediction; leave it out (the loss "
    "has a stage of its own where parallel.layers_per_stage ends in 0)"
)


def expert_key(hf: HFConfig) -> str:
    """Which of EXPERT_KEYS this config.json has; the first where it has none."""
    return next((key for key in EXPERT_KEYS if hf.get(key)), EXPERT_KEYS[0])


def num_experts(hf: HFConfig) -> int:
    """Routed experts of a layer; 0 for a model without."""
    return hf.get(expert_key(hf)) or 0


class Layout(Protocol):
    """Sizes of the parallel dimensions; see ParallelConfig in config/schema.py."""

    tp: int
    sp: bool | None
    ep: int
    etp: int
    pp: int
    vpp: int | None
    cp: int
    dp: int | None
    layers_per_stage: tuple[int, ...] | None
    mtp_standalone: bool


class Generator(Protocol):
    """The generator's part of RolloutConfig."""

    tp: int
    ep: int
    dp: int | None
    dcp: int
    max_num_seqs: int
    max_batched_tokens: int

    @property
    def engine(self) -> str: ...


def least_microbatches(pp: int) -> int:
    """So many microbatches a step at least, where nothing else is asked for: a third of a pipeline's time is idle then."""
    return 2 * pp if pp > 1 else 1


def process_problems(layout: Layout, processes: int) -> Iterator[str]:
    """Why so many processes cannot be laid out so."""
    dense, experts = layout.tp * layout.pp * layout.cp, layout.ep * layout.etp * layout.pp
    for keys, size in (("tp * pp * cp", dense), ("ep * etp * pp", experts)):
        if processes % size:
            yield f"parallel: {processes} processes cannot be divided by {keys} = {size}; change one of them"
    if processes % dense == 0 and layout.dp is not None and layout.dp * dense != processes:
        yield (
            f"parallel.dp = {layout.dp} with tp * pp * cp = {dense} wants {layout.dp * dense} processes, "
            f"there are {processes}; leave dp out, it follows"
        )


def model_problems(layout: Layout, hf: HFConfig) -> Iterator[str]:
    """Why a model with this config.json cannot be laid out so; each names the number to change."""
    experts = num_experts(hf)
    divisions = [
        ("parallel.tp", layout.tp, "num_attention_heads"),
        ("parallel.tp", layout.tp, "intermediate_size"),
        ("parallel.ep", layout.ep, expert_key(hf)),
        ("parallel.etp", layout.etp, "moe_intermediate_size"),
    ]
    if not hf.get("kv_lora_rank"):  # latent attention has as many keys as queries
        divisions.append(("parallel.tp", layout.tp, "num_key_value_heads"))
    if layout.layers_per_stage is None:
        divisions.append(("parallel.pp * vpp", num_stages(layout), "num_hidden_layers"))
    yield from _division_problems(divisions, hf)
    yield from _shared_expert_problems("parallel.tp", layout.tp, hf)
    if not experts and (layout.ep > 1 or layout.etp > 1):
        yield f"parallel.ep = {layout.ep}, parallel.etp = {layout.etp}: a model without experts wants 1 and 1"
    if experts and layout.tp > 1 and layout.sp is False:
        yield "parallel.sp = false: a mixture of experts with parallel.tp > 1 needs sequence parallelism; leave sp out"
    if (layout.vpp or 1) > 1 and layout.pp == 1:
        yield f"parallel.vpp = {layout.vpp} wants parallel.pp > 1"
    if layout.layers_per_stage is not None and hf.get("num_hidden_layers"):
        yield from _stage_problems(layout, layout.layers_per_stage, hf["num_hidden_layers"])
    if layout.mtp_standalone:
        yield from _standalone_problems(layout, hf)


def generator_problems(generator: Generator, processes: int, hf: HFConfig, *, together: bool = True) -> Iterator[str]:
    """Why the generators of a rollout cannot be laid out so; each names the number to change. hf: {} when unknown.

    together: whether all of them start to sample together and wait for the last, as those that share experts must.
    """
    tp, ep, dp = generator.tp, generator.ep, generator.dp
    if hf and hf.get("model_type") not in GENERATED_MODEL_TYPES:
        yield (
            f"rollout: model_type {hf.get('model_type')!r} is not one of {', '.join(GENERATED_MODEL_TYPES)}: the generator "
            "cannot sample from such a model"
        )
    if processes % tp:
        yield f"rollout.tp = {tp} does not divide the {processes} processes; {math.gcd(tp, processes)} would"
    elif dp is not None and dp * tp != processes:
        yield (
            f"rollout.dp = {dp} with rollout.tp = {tp} wants {dp * tp} processes, there are {processes}; leave dp out, "
            "it follows"
        )
    if generator.max_batched_tokens < generator.max_num_seqs:
        yield (
            f"rollout.max_batched_tokens = {generator.max_batched_tokens} is below rollout.max_num_seqs = "
            f"{generator.max_num_seqs}: every sample in flight takes a token of a pass; raise the one or lower the other"
        )
    if ep > 1:
        yield from _expert_problems(generator, processes, hf, together)
    if generator.dcp > 1:
        yield from _cache_problems(generator, hf)
    divisions = [("rollout.tp", tp, "num_attention_heads"), ("rollout.tp", tp, "intermediate_size")]
    divisions.append(("rollout.ep", ep, expert_key(hf)) if ep > 1 else ("rollout.tp", tp, "moe_intermediate_size"))
    yield from _division_problems(divisions, hf)
    if not ep > tp:  # then each rank holds them whole
        yield from _shared_expert_problems("rollout.tp", tp, hf)
    groups = None if hf.get("kv_lora_rank") else hf.get("num_key_value_heads")
    if groups and max(groups, tp) % min(groups, tp):  # with fewer groups than ranks each is held more than once
        yield f"rollout.tp = {tp} neither divides the model's num_key_value_heads = {groups} nor is a multiple of it"
    padded = -(-(hf.get("vocab_size") or 0) // VOCABULARY_PADDING) * VOCABULARY_PADDING
    if padded % tp:
        yield f"rollout.tp = {tp} does not divide the vocabulary, {padded} rows with vLLM's padding"


def _expert_problems(generator: Generator, processes: int, hf: HFConfig, together: bool) -> Iterator[str]:
    tp, ep = generator.tp, generator.ep
    if hf and not num_experts(hf):
        yield f"rollout.ep = {ep}: a model without experts wants 1"
    if generator.engine != "vllm":
        yield f"rollout.ep = {ep} wants rollout.engine = vllm, not {generator.engine}; leave ep out"
    if ep % tp:
        yield f"rollout.ep = {ep}: experts are spread over whole generators, so that it is 1 or a multiple of rollout.tp = {tp}"
    elif processes % ep:
        yield f"rollout.ep = {ep} does not divide the {processes} processes"
    if ep > tp and not together:
        yield (
            f"rollout.ep = {ep} over generators of rollout.tp = {tp} makes them pass the model together, and in this stage each "
            "samples at its own pace; set rollout.ep to 1 or rollout.tp"
        )


def _cache_problems(generator: Generator, hf: HFConfig) -> Iterator[str]:
    """Of vllm/config/parallel.py and model.py (verify_with_parallel_config)."""
    tp, dcp = generator.tp, generator.dcp
    if generator.engine != "vllm":
        yield f"rollout.dcp = {dcp} wants rollout.engine = vllm, not {generator.engine}; leave dcp out"
    if tp % dcp:
        yield f"rollout.dcp = {dcp} does not divide rollout.tp = {tp}"
    groups, heads = hf.get("num_key_value_heads"), hf.get("num_attention_heads")
    if hf.get("kv_lora_rank") or not groups or not heads:
        return
    if dcp > (alike := max(1, tp // groups)):
        yield (
            f"rollout.dcp = {dcp}: with num_key_value_heads = {groups} and rollout.tp = {tp}, {alike} ranks have the same cache; "
            f"set it to {alike} at most"
        )
    elif heads // groups % dcp:
        yield f"rollout.dcp = {dcp} does not divide the model's {heads // groups} query heads a key-value head"


def _division_problems(divisions: Sequence[tuple[str, int, str]], hf: HFConfig) -> Iterator[str]:
    """divisions: (config key, its value, key of config.json that it must divide)."""
    for key, size, name in divisions:
        value = hf.get(name)
        if value and value % size:
            smaller = max(d for d in range(1, size + 1) if value % d == 0)
            uneven = ", or set parallel.layers_per_stage" if name == "num_hidden_layers" else ""
            yield f"{key} = {size} does not divide the model's {name} = {value}; {smaller} would{uneven}"


def _shared_expert_problems(key: str, tp: int, hf: HFConfig) -> Iterator[str]:
    shared = (hf.get("n_shared_experts") or 0) * (hf.get("moe_intermediate_size") or 0)
    if shared % tp:
        yield f"{key} = {tp} does not divide n_shared_experts * moe_intermediate_size = {shared}"


def _stage_problems(layout: Layout, given: Sequence[int], layers: int) -> Iterator[str]:
    stages = num_stages(layout)
    if len(given) != stages:
        yield (
            f"parallel.layers_per_stage has {len(given)} numbers; parallel.pp * vpp = {layout.pp} * {layout.vpp or 1} "
            f"wants {stages}"
        )
    if sum(given) != layers:
        yield (
            f"parallel.layers_per_stage adds up to {sum(given)} layers, the model's num_hidden_layers is {layers}: "
            f"{'take away' if sum(given) > layers else 'add'} {abs(sum(given) - layers)}"
        )
    if 0 in given[1 : mtp_stage(layout)]:
        yield (
            f"parallel.layers_per_stage: stage {given.index(0, 1)} holds nothing; only the first stage (it has the "
            "embedding) and the last (multi-token prediction and the output layer; with parallel.mtp_standalone the last "
            "two) may have 0"
        )


def _standalone_problems(layout: Layout, hf: HFConfig) -> Iterator[str]:
    """Megatron: all layers of multi-token prediction in one stage, behind those of the decoder, one embedding a rank."""
    key, counts = "parallel.mtp_standalone", layout.layers_per_stage
    if layout.pp == 1:
        yield f"{key} wants parallel.pp > 1: the output layer and the loss get a stage of their own"
    elif counts is None or counts[-1:] != (0,):
        said = "is not set" if counts is None else f"ends in {counts[-1]}" if counts else "is empty"
        yield (
            f"{key}: the last stage has the output layer and the loss alone, and parallel.layers_per_stage {said}; end it in 0"
        )
    if layout.pp == 2 and (layout.vpp or 1) > 1:
        yield (
            f"{key}: with parallel.pp = 2 and vpp = {layout.vpp} the stage before the last is on the first rank, which would "
            "hold the embedding twice; set pp to 3 or more, or leave vpp out"
        )
    if hf and not hf.get("num_nextn_predict_layers"):
        yield f"{key}: the model has no layers of multi-token prediction (num_nextn_predict_layers); leave it out"
    if hf.get("tie_word_embeddings"):
        yield f"{key}: with tied embeddings (tie_word_embeddings) they would be in three stages; leave it out"


def num_stages(layout: Layout) -> int:
    """Stages that a token passes, virtual ones counted."""
    return layout.pp * (layout.vpp or 1)


def mtp_stage(layout: Layout) -> int:
    """The stage that has the layers of multi-token prediction where they are built, and a copy of the embedding."""
    return num_stages(layout) - 1 - layout.mtp_standalone


def stage_layers(layout: Layout, num_layers: int) -> tuple[range, ...]:
    """The decoder layers (from 0) of each stage, in the order of the model.

    Stage s is chunk s // pp of pipeline rank s % pp. The first one has the embedding too, the last one the output layer and,
    where no layers of multi-token prediction are built, the final norm; else `mtp_stage` has those, and the norm is with the
    last decoder layer: they read it, too.
    """
    stages = num_stages(layout)
    counts = layout.layers_per_stage or (num_layers // stages,) * stages
    return tuple(range(end - count, end) for end, count in zip(accumulate(counts), counts, strict=True))
