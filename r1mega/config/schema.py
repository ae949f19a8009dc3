"""What a run can be told, as frozen pydantic models: the sections that stages share, and `Stage`, what all of them have.

One file is one stage; `stages/` holds a module for each, with the sections that only it has and its checks across keys.
Defaults are the paper's figures where it gives them (marked "paper") and the field's usual ones elsewhere.
Loading, includes, overrides and error messages: `load.py`. Checks across keys that all stages share: `validate.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from r1mega.config.scalars import as_meant

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values do not change after loading, numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: object, info: ValidationInfo) -> object:
        return as_meant(value, cls.model_fields[info.field_name or ""].annotation)


class ParallelConfig(Section):
    """Megatron-core layout. World size = tp * pp * cp * dp; experts are laid out over ep * etp within it."""

    tp: PositiveInt = 1
    sp: bool | None = None  # sequence parallelism; None: on whenever tp > 1
    ep: PositiveInt = 1
    etp: PositiveInt = 1
    pp: PositiveInt = 1
    vpp: PositiveInt | None = None  # virtual pipeline stages per rank
    layers_per_stage: tuple[NonNegativeInt, ...] | None = None
    # decoder layers of each of the pp * vpp stages in the order of the model (stage s runs on pipeline rank s % pp);
    # None: equally many. DeepSeek-V3's 61 on pp=16: [4, 4, ... 4, 1], the last with MTP and loss
    mtp_standalone: bool = False  # the loss alone in the last stage (0 in layers_per_stage), MTP in the one before it
    cp: PositiveInt = 1
    dp: PositiveInt | None = None  # None: what the world size leaves


Dtype = Literal["float32", "bfloat16"]
Fp8 = Literal["off", "tensorwise", "blockwise"]
LogProbs = Literal["logits", "hidden", "reference"]
RecomputeModule = Literal["core_attn", "mla_up_proj", "layernorm", "mlp", "moe", "moe_act", "shared_experts"]
"""Parts of a layer that a backward pass can compute again instead of keeping what they gave: Megatron's `recompute_modules`."""


def _recompute_in_words(value: object) -> object:
    """What was asked for, or an error that says what can be: pydantic would describe both kinds of value apart."""
    known = get_args(RecomputeModule)
    if value in ("none", "full") or (isinstance(value, list | tuple) and all(name in known for name in value)):
        return value
    was = "; selective was [core_attn], which frees nothing with fused attention" if value == "selective" else ""
    raise PydanticCustomError(
        "recompute", "must be none, full, or a list of {known}{was}", {"known": ", ".join(known), "was": was}
    )


Recompute = Annotated[Literal["none", "full"] | tuple[RecomputeModule, ...], BeforeValidator(_recompute_in_words)]


OffloadModule = Literal["attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act"]
"""Parts of a layer whose inputs can wait in host memory for the backward pass: Megatron's `offload_modules`."""

Dispatcher = Literal["alltoall", "deepep", "hybridep"]


class MegatronConfig(Section):
    """Keys of megatron-core's TransformerConfig, handed on as they are and checked by it before anything starts. None of
    them changes what is computed but for rounding; docs/configuration.md says what each is for, who sets it, and what has been run.
    """

    moe_shared_expert_overlap: bool = False  # the shared experts compute while tokens travel to the others
    overlap_moe_expert_parallel_comm: bool = False
    # while a microbatch's tokens travel in its forward pass another computes in its backward pass, and the other way round
    moe_router_fusion: bool = False
    apply_rope_fusion: bool = False
    gradient_accumulation_fusion: bool | None = None  # None: where apex is
    attention_backend: Literal["auto", "flash", "fused", "unfused"] = "auto"  # of Transformer Engine
    cp_comm_type: Literal["p2p", "all_gather", "a2a"] | None = None  # of its attention; None: p2p
    min_offloaded_tensor_size: NonNegativeInt = 1024 * 1024  # numbers; model.offload_modules leaves smaller tensors


class ModelConfig(Section):
    """The policy. `path` is an HF directory (config.json; weights and tokenizer when it is to be loaded)."""

    path: Path
    dtype: Dtype = "bfloat16"
    fp8: Fp8 = "off"
    # needs Transformer Engine; tensorwise: one scale a tensor (e4m3 forward, e5m2 backward); blockwise: DeepSeek-V3's,
    # one for 128 values of an activation and 128x128 of a weight (e4m3). See docs/fp8.md
    fp8_skip_first_layers: NonNegativeInt = 0  # decoder layers at the start that compute in `dtype` all the same
    fp8_skip_last_layers: NonNegativeInt = 0  # and at the end
    expert_bias_update_rate: NonNegative = 0.0  # DeepSeek-V3: 1e-3 in pre-training; 0 freezes the router bias
    sequence_aux_loss_coefficient: NonNegative = 0.0  # DeepSeek-V3: 1e-4
    mtp_loss_coefficient: NonNegative = 0.0  # used where labels are known (pre-training, SFT); 0: MTP is not built
    recompute: Recompute = "none"
    # full: only the inputs of layers are kept; a list: these parts of a layer are computed again (docs/configuration.md)
    offload_modules: tuple[OffloadModule, ...] = ()
    # what the backward pass wants of the inputs of these parts is in host memory until then (docs/gpu.md)
    dispatcher: Dispatcher = "alltoall"
    # of tokens to experts: all-to-all of the distributed backend, or one of deep_ep's two kernels
    megatron: MegatronConfig = MegatronConfig()
    log_probs: LogProbs = "logits"
    # logits: the compiled kernels; hidden: the same without ever holding [tokens, vocabulary]; reference: plain torch
    force_expert_balance: bool = False  # for benchmarks alone: the trainer's tokens go to random experts, evenly


class OptimizerConfig(Section):
    """Adam with decoupled weight decay (Megatron's distributed optimizer)."""

    lr: Positive = 3e-6  # paper, stage 0
    min_lr: NonNegative = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: NonNegativeInt = 0
    decay_steps: PositiveInt | None = None  # length of the final decay; None: all steps after the warm-up
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.01
    clip_grad: NonNegative = 1.0
    skip_nonfinite: NonNegativeInt = 0
    # optimizer steps in a row that are left out when their gradient is not finite; one more ends the run
    overlap_grad_reduce: bool = False  # gradients are reduced, in buckets, while the backward pass goes on
    overlap_param_gather: bool = False  # new weights are gathered by the next update's forward pass, layer before layer
    grad_reduce_in_fp32: bool = True  # False: gradients are kept, added up and reduced in model.dtype
    precision_aware: bool = False
    # moments are stored in the next two types, and gradients are read as they are kept: for bfloat16 weights. Arithmetic,
    # main parameters and checkpoints stay float32
    exp_avg_dtype: Dtype = "bfloat16"
    exp_avg_sq_dtype: Dtype = "bfloat16"
    cpu_offload: bool = False  # Adam runs on the CPU (torch's) with its state in host memory; for bfloat16 weights


class MemoryConfig(Section):
    """What of the trainer leaves the device, and when; by the field's names. No key changes a bit of what is trained
    (docs/gpu.md: which frees what in which phase).
    """

    grad_offload: bool = False  # gradient buffers are freed outside of the update
    optimizer_offload: Literal["none", "rollout", "update"] = "none"
    # rollout: main parameters and moments are in host memory outside of the update; update: there too, but for the step
    param_offload: bool = False  # weights are in host memory while the generator is awake
    reference_swap: bool = False  # weights are in host memory while the reference's are on the device


class CheckpointConfig(Section):
    """torch_dist checkpoints under RUN_DIR/checkpoints/step_NNNNNN."""

    every_steps: PositiveInt = 10
    keep: PositiveInt = 2
    async_save: bool = False  # write in the background; takes the checkpoint's size again in host memory meanwhile


class TimeoutsConfig(Section):
    """How long a rank waits for the others, in seconds, before it ends the run (docs/layouts.md). A rank that ends is
    noticed at once, by its launcher or its closed connections: these are for ranks that hang.
    """

    startup_seconds: Positive = (
        3600  # until all processes have met, and later until all have their models and generators
    )
    collective_seconds: Positive = 1800  # in one collective of forward, backward, update, resharding
    rollout_seconds: Positive = 6 * 3600
    # of the generator that is done first for the slowest, rewards included; or ten times what its own part took, if that is longer
    checkpoint_seconds: Positive = 3600  # for the rank whose files take longest to write or verify


class WatchdogConfig(Section):
    """When a job that stands still is ended, with the rank named that it waits for (docs/faults.md)."""

    enabled: bool = True  # off where a debugger holds a rank
    seconds: Positive | None = None
    # without any rank getting on; None: ten times the phase's longest pause so far, at least 600; 3600 in a phase not yet seen;
    # never less than `timeouts` allows there
    silent_seconds: Positive = 60
    # without a sign of a rank; five times that where its process is known to run, and in the start: a call of C that keeps Python's
    # lock silences the thread that gives it


class RestartConfig(Section):
    """When `r1mega train --ranks N` starts again by itself after a rank died (docs/faults.md)."""

    per_hour: NonNegativeInt = 3
    backoff_seconds: NonNegative = 30  # before the first of an hour; twice as long before each further one


class ObserveConfig(Section):
    """metrics.jsonl is always written; these add to it."""

    tensorboard: bool = True
    wandb_project: str | None = None
    samples_every_steps: PositiveInt = 5  # how often samples.jsonl gets lines
    samples_per_step: NonNegativeInt = 4
    peak_tflops: Positive | None = None  # of one device, for perf/*_mfu; None: by its name where that is known


class DataConfig(Section):
    """Prompt files: rows of {"question", "answer", optional "id", "kind", "language", ...}; docs/data.md has what else."""

    prompts: tuple[Path, ...]
    template: str = "r1_zero"  # a name from data/template.py, or a Jinja2 text with {{ question }}
    kind: str = "math"  # for lines without the key
    language: str | None = None  # for lines without the key
    on_bad_line: Literal["error", "skip"] = "error"
    on_long_prompt: Literal["error", "skip"] = "error"
    max_prompt_tokens: PositiveInt = 1024


class PartialRollouts(Section):
    """Steps that do not wait for their longest responses (docs/rollouts.md). Off at overdraw = 1."""

    overdraw: Annotated[float, Field(ge=1, le=16)] = (
        1.0  # groups sampled at once over num_prompts, which a step trains on
    )
    max_staleness: NonNegativeInt = 1  # updates between the weights that sampled a token and those that train on it
    on_stale: Literal["finish", "drop"] = "finish"
    # of what is older: the step waits for it, or its prompt is drawn anew, which prefers prompts with short responses
    every_tokens: PositiveInt = 64  # a step adds a multiple of it to the responses that it leaves unfinished

    @property
    def is_on(self) -> bool:
        return self.overdraw > 1

    def open_groups(self, num_prompts: int) -> int:
        """Sampled at once where a step trains on num_prompts. Of overdraw as it is written: 1.1 of 10 are 11, not 12."""
        return math.ceil(Fraction(str(self.overdraw)) * num_prompts)


Quantization = Literal["fp8"]
KVCacheDtype = Literal["auto", "fp8", "fp8_e4m3"]


class RolloutConfig(Section):
    """Sampling of groups, and the generator that does it."""

    engine: Literal["vllm", "transformers"] = "vllm"
    num_prompts: PositiveInt = 512  # a rollout, over all data-parallel ranks (paper: 8,192 responses)
    group_size: PositiveInt = 16  # responses a prompt (paper)
    temperature: Annotated[float, Field(ge=0.01)] = 1.0  # paper
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: PositiveInt | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of the likeliest token's probability
    max_kept_ids: PositiveInt = 1024
    # in RL, with top_p, top_k or min_p: ids that a token is drawn from at most, whatever these keep; all of them go with the sample
    max_response_tokens: PositiveInt = 32768  # paper
    stop: tuple[str, ...] = ("</answer>",)  # texts that end a response (and belong to it), besides the tokenizer's eos
    tp: PositiveInt = 1  # ranks that make one generator
    ep: PositiveInt = 1
    # 1: every expert cut by tp; a multiple of tp: whole experts, spread over so many ranks, which are ep / tp generators with
    # prompts and KV caches of their own (data-parallel attention) that pass the model together
    dp: PositiveInt | None = None  # generators; None: as many as tp leaves of the processes
    dcp: PositiveInt = (
        1  # ranks of a generator that share what each would hold alike of the KV cache (MLA: all); divides tp
    )
    max_num_seqs: PositiveInt = 256
    max_batched_tokens: PositiveInt = 8192  # of one pass, at least max_num_seqs; longer prompts take several passes
    quantization: Quantization | None = None
    # fp8: linear layers of the generator hold DeepSeek-V3's published 128x128 blocks in e4m3, quantised at each push
    kv_cache_dtype: KVCacheDtype = "auto"  # as vLLM names it; auto: model.dtype; fp8 is fp8_e4m3 and wants bfloat16
    kv_cache_bytes: PositiveInt | None = None  # None: vLLM's own choice on a GPU; 256 MiB on a CPU
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.8
    sleep: bool = True  # free the KV cache during the update, and on a GPU the generator's weights and CUDA graphs
    partial: PartialRollouts = PartialRollouts()
    work_sharing: bool = True  # groups beyond the max_num_seqs of their generator go to the one that has room first
    durable: bool = True  # what is sampled and scored is on disk before its step ends: a start after a kill reads it
    router_replay: bool = False  # the update repeats the generator's choices of experts (R3)

    @property
    def cuts_vocabulary(self) -> bool:
        """Whether tokens are drawn from a part of it."""
        return self.top_p < 1 or self.top_k is not None or self.min_p > 0

    @property
    def computes_in_fp8(self) -> bool:
        """Whether the generator holds weights, or keys and values, in 8 bits: its log-probs are further from the policy's."""
        return self.quantization is not None or self.kv_cache_dtype != "auto"


class WeightsConfig(Section):
    """Trainer -> generator, and its proof."""

    strategy: Literal["direct", "gather"] | None = None
    # direct: shard to shard by a plan (see `r1mega reshard explain`), into vLLM only; gather: whole tensors through the
    # generator's loader; None: direct where the generator is vLLM
    bucket_bytes: PositiveInt = 512 * 2**20
    shared_memory: bool = True  # of ranks on one CPU machine, by `direct`, instead of messages
    verify: bool = True
    probe_sequences: PositiveInt | None = None  # None: 2 in float32, 16 (made-up ones) in bfloat16
    probe_tolerance: Positive | None = (
        None  # None: 2e-4 in float32; 0.15 in bfloat16, 0.25 with FP8, where a tenth may be off by more
    )


class EvaluateConfig(Section):
    """pass@1 as the mean over num_samples samples; cons@k by majority when num_samples > 1."""

    data: Path | None = None
    every_steps: PositiveInt | None = None  # None: before the first and after the last step only
    num_prompts: PositiveInt | None = None  # None: all
    num_samples: PositiveInt = 1
    temperature: NonNegative = 0.6  # paper; 0: greedy
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95  # paper
    seed: NonNegativeInt = 0


class Stage(Section):
    """Keys that every stage has, and what the program asks any stage."""

    outputs: ClassVar[tuple[str, ...]] = ("hf/config.json",)
    """What a finished stage leaves, relative to run_dir."""

    stage: str
    run_dir: Path
    seed: NonNegativeInt = 0
    threads: PositiveInt | None = None  # CPU threads a rank; None: its share of the cores it may use
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    timeouts: TimeoutsConfig = TimeoutsConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    restart: RestartConfig = RestartConfig()
    observe: ObserveConfig = ObserveConfig()

    def is_finished_at(self, step: int) -> bool:
        """Whether a run that ended as finished at `step` did all that this config asks."""
        return True

    def prompt_data(self) -> list[DataConfig]:
        """The prompt files that are read whole, and checked, before anything starts."""
        return []

    def problems(self, hf: dict[str, Any], world: int) -> Iterator[str]:
        """What cannot work, over the checks that all stages share; hf: the model's config.json, world: processes."""
        yield from ()


class TrainingStage(Stage):
    """A stage that changes weights."""

    optimizer: OptimizerConfig = OptimizerConfig()
    memory: MemoryConfig = MemoryConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def memory_problems(self) -> Iterator[str]:
        """What `optimizer` and `memory` cannot have together."""
        if self.optimizer.cpu_offload and self.model.dtype != "bfloat16":
            yield (
                f"optimizer.cpu_offload with model.dtype = {self.model.dtype}: megatron-core's HybridDeviceOptimizer cannot load "
                "a checkpoint of float32 weights; set model.dtype=bfloat16 or optimizer.cpu_offload=false"
            )
        if self.optimizer.precision_aware and self.model.dtype != "bfloat16":
            yield (
                f"optimizer.precision_aware with model.dtype = {self.model.dtype}: Megatron keeps a second copy of float32 weights "
                "with it; set model.dtype=bfloat16 or optimizer.precision_aware=false"
            )
        if self.optimizer.precision_aware and self.optimizer.cpu_offload:
            yield (
                "optimizer.precision_aware stores the moments of an Adam on the device, and optimizer.cpu_offload moves it to the "
                "CPU (torch's, float32); leave one of them out"
            )
        for beta, dtype in (("beta1", "exp_avg_dtype"), ("beta2", "exp_avg_sq_dtype")):
            decay = getattr(self.optimizer, beta)
            narrow = self.optimizer.precision_aware and getattr(self.optimizer, dtype) == "bfloat16"
            if narrow and decay > 1 - 2**-8:  # 8 bits: half of the last one
                yield (
                    f"optimizer.{beta} = {decay} with {dtype} = bfloat16: a decay of less than 2^-8 is rounded away and the "
                    f"moment never falls; set optimizer.{dtype}=float32"
                )
        if self.optimizer.cpu_offload and self.memory.optimizer_offload != "none":
            yield (
                f"memory.optimizer_offload = {self.memory.optimizer_offload} moves what optimizer.cpu_offload keeps in host "
                "memory for good; leave one of them out"
            )
        held = [key for key in ("param_offload", "reference_swap") if getattr(self.memory, key)]
        if held and "rollout" not in type(self).model_fields:
            yield f"memory.{held[0]} is for stages that have a generator or a reference; leave it out of stage {self.stage}"
