"""`r1mega plan` against published figures: seconds of GRPO steps (two constants fitted on some, judged on the others), and memory.

python tools/plan_back_test.py        # the tables in docs/plan.md
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from r1mega.config.schema import DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, Recompute, RolloutConfig
from r1mega.config.stages.rl import RLStage, UpdateConfig
from r1mega.config.stages.sft import SFTData, SFTStage
from r1mega.plan.calibrate import fit
from r1mega.plan.generator import generator_memory
from r1mega.plan.given import on_the_host
from r1mega.plan.gpu import Efficiency, gpu_kind
from r1mega.plan.seconds import layer_parameters, plan_seconds, reshard_seconds
from r1mega.plan.workload import Lengths, replicas_work, workload

Json = dict[str, Any]

CONFIGS = Path(__file__).parents[1] / "configs"
PROMPT, CV = 150, 0.6
"""Not published: tokens of a prompt of OpenMathInstruct-2, and how far lengths spread."""


FITTED_OF = 13
"""The later points came when model and constants stood."""
HALVINGS = 30
"""Of the interval in which the mean before clipping is looked for."""


class Point(Protocol):
    """A published time of a step on H100 in bfloat16. fitted: the constants are fitted to it, and others judged by it."""

    @property
    def name(self) -> str: ...
    @property
    def gpus(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    def predict(self, efficiency: Efficiency) -> float: ...


@dataclass(frozen=True, slots=True)
class Grpo:
    """A row of NVIDIA NeMo RL, docs/about/performance-summary.md: GRPO on DGX H100 in bfloat16, on policy; layers of the stages,
    samples of a group and recomputation by the release's recipe (examples/configs/recipes/llm/performance).
    """

    name: str
    hf: Json
    gpus: int
    samples: int
    minibatch: int
    longest: int
    mean: float
    generator_tp: int
    layout: Json
    seconds: float
    group: int = 32
    recompute: Recompute = "full"

    def predict(self, efficiency: Efficiency) -> float:
        """With NeMo RL's way to hand over weights in the place of this project's: every rank gets every whole tensor
        (nemo_rl/models/policy/megatron_policy_worker.py, `export_hf_weights` of Megatron-Bridge).
        """
        config = RLStage(
            stage="zero",
            run_dir=Path("unused"),
            model=ModelConfig(path=Path("unused"), recompute=self.recompute),
            parallel=ParallelConfig(**self.layout),
            data=DataConfig(prompts=()),
            rollout=RolloutConfig(
                num_prompts=self.samples // self.group, group_size=self.group, tp=self.generator_tp, max_num_seqs=512,
                max_response_tokens=self.longest - PROMPT, gpu_memory_utilization=0.6,
            ),
            update=UpdateConfig(num_minibatches=self.samples // self.minibatch, microbatch_tokens=self.longest),
        )  # fmt: skip
        gpu, p = gpu_kind("h100-80"), config.parallel
        drawn = _lengths(self.mean - PROMPT, self.samples, config)
        work = workload(config, drawn, self.gpus // (p.tp * p.pp * p.cp))
        generator = generator_memory(self.hf, torch.bfloat16, config.rollout, gpu.memory_bytes)
        phases = plan_seconds(
            config, self.hf, self.gpus, gpu, work, generator, imbalance=1.2, per_node=8, efficiency=efficiency
        ).phases
        dense, experts = (sum(sizes) for sizes in zip(*layer_parameters(self.hf), strict=True))
        whole = 2 * (dense + experts + 2 * self.hf["vocab_size"] * self.hf["hidden_size"])
        handed_over = whole * reshard_seconds(p, self.hf, self.gpus, gpu, 8, efficiency)
        return sum(phases.values()) - phases["reshard"] + handed_over


@dataclass(frozen=True, slots=True)
class Training:
    """A row of NVIDIA-NeMo/Megatron-Bridge, examples/model_verification_cards: optimizer steps on H100, a sample a microbatch;
    layout and recomputation by the recipe that the card names. imbalance: 1 where it forces experts to be balanced.
    """

    name: str
    hf: Json
    gpus: int
    samples: int
    tokens: int
    layout: Json
    recompute: Recompute
    imbalance: float
    seconds: float
    mtp: float = 0.0

    def predict(self, efficiency: Efficiency) -> float:
        config = SFTStage(
            stage="sft",
            run_dir=Path("unused"),
            model=ModelConfig(
                path=Path("unused"), recompute=self.recompute, dispatcher="hybridep", mtp_loss_coefficient=self.mtp
            ),
            parallel=ParallelConfig(**self.layout),
            data=SFTData(files=(), max_tokens=self.tokens),
            batch_size=self.samples,
            microbatch_tokens=self.tokens,
        )
        work = replicas_work(config, Lengths(given=(self.tokens,)), self.gpus)
        return plan_seconds(
            config, self.hf, self.gpus, gpu_kind("h100-80"), work, None,
            imbalance=self.imbalance, per_node=8, efficiency=efficiency,
        ).total  # fmt: skip


def _lengths(mean: float, samples: int, config: RLStage) -> Lengths:
    """Lengths that have this mean when they have been clipped at the longest, as published ones have."""
    low, high = mean, 100 * mean
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        drawn = Lengths(middle, CV).draw(samples, config.rollout.max_response_tokens, config.seed)
        low, high = (middle, high) if sum(drawn) < mean * samples else (low, middle)
    return Lengths(high, CV, prompt=PROMPT)


def _published(name: str) -> Json:
    return json.loads((CONFIGS / name / "model/config.json").read_text())


def _dense(kind: str, layers: int, hidden: int, intermediate: int, heads: int, vocabulary: int) -> Json:
    return {
        "model_type": kind, "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": vocabulary,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 40960,
    }  # fmt: skip


def points() -> list[Point]:
    """In the order of their publication; of the first FITTED_OF every other one is fitted, all others are judged."""
    deepseek, qwen30, moonlight = (_published(name) for name in ("deepseek_v3_671b", "qwen3_30b_a3b", "moonlight_16b"))
    qwen235 = qwen30 | {
        "num_hidden_layers": 94, "hidden_size": 4096, "num_attention_heads": 64, "moe_intermediate_size": 1536,
        "intermediate_size": 12288,
    }  # fmt: skip
    llama, qwen32 = (
        _dense("llama", 32, 4096, 14336, 32, 128256),
        _dense("qwen3", 64, 5120, 25600, 64, 151936),
    )
    stages: Json = {"pp": 16, "ep": 16, "layers_per_stage": (3, *[4] * 14, 2)}
    stages235: Json = {"tp": 2, "cp": 2, "ep": 16, "pp": 8, "layers_per_stage": (11, *[12] * 6, 11)}
    interleaved: Json = {"tp": 2, "pp": 8, "vpp": 4, "ep": 64, "layers_per_stage": (1, *[2] * 30, 0)}
    return [
        Grpo("DeepSeek-V3, NeMo RL 0.4", deepseek, 256, 512, 512, 1536, 745, 32, stages, 154, 16),
        Grpo("Qwen3-235B-A22B, 0.4", qwen235, 128, 512, 512, 8192, 5671, 16, stages235, 506),
        Grpo("Qwen3-30B-A3B, 0.4", qwen30, 32, 2048, 512, 4096, 3154, 4, {"tp": 2, "ep": 8}, 225, 32, "none"),
        Grpo("Qwen3-32B, 0.4", qwen32, 32, 2048, 512, 4096, 3206, 4, {"tp": 4, "pp": 4}, 393, 32, "none"),
        Grpo("Llama-3.1-8B, 0.4", llama, 16, 2048, 512, 4096, 1060, 1, {"pp": 2}, 97.7),
        Grpo("DeepSeek-V3, NeMo RL 0.6", deepseek, 256, 512, 512, 1536, 701, 32, stages, 134, 16),
        Grpo("DeepSeek-V3, 0.6", deepseek, 512, 512, 512, 1536, 697, 32, stages | {"ep": 32}, 111, 16),
        Grpo("Qwen3-235B-A22B, 0.6", qwen235, 128, 512, 512, 8192, 5698, 16, stages235, 395),
        Grpo("Qwen3-235B-A22B, 0.6", qwen235, 256, 512, 512, 8192, 5713, 16, stages235, 312),
        Grpo("Qwen3-30B-A3B, 0.6", qwen30, 32, 2048, 512, 4096, 3203, 2, {"ep": 8}, 192, 32, "none"),
        Training("Moonlight-16B, pre-training", moonlight, 16, 1024, 4096, {"ep": 8}, "none", 1.2, 11.636),
        Training("Moonlight-16B, SFT", moonlight, 8, 8, 8192, {"ep": 8}, "none", 1.2, 0.562),
        Training(
            "DeepSeek-V3, pre-training", deepseek, 1024, 16384, 4096, interleaved, ("mla_up_proj", "mlp"), 1.0, 61.756, 0.1
        ),
        Training("Qwen3-30B-A3B, pre-training, tuned", qwen30, 16, 1024, 4096, {"ep": 16}, "none", 1.0, 20.147),
        Training("Qwen3-30B-A3B, pre-training", qwen30, 16, 1024, 4096, {"ep": 16}, "none", 1.2, 30.29),
        Training("Qwen3-30B-A3B, SFT", qwen30, 16, 32, 2048, {"ep": 16}, "none", 1.2, 1.206),
        Training("Moonlight-16B, SFT, cp 2", moonlight, 8, 128, 8192, {"tp": 2, "cp": 2, "ep": 8}, "none", 1.2, 60.599),
    ]  # fmt: skip


def table() -> list[str]:
    """Lines of Markdown."""
    given = points()
    efficiency = fit([(point.predict, point.seconds) for point in given[:FITTED_OF:2]])
    lines = ["| a step on H100 | GPUs | published | predicted | off by | |", "|---|---|---|---|---|---|"]
    for index, point in enumerate(given):
        predicted = point.predict(efficiency)
        off = predicted / point.seconds - 1
        fitted = index < FITTED_OF and index % 2 == 0
        note = ("fitted" if fitted else "judged") + ("" if abs(off) <= 0.3 else ", **missed**")
        lines.append(
            f"| {point.name} | {point.gpus:,} | {point.seconds:.3g} s | {predicted:.3g} s | {off:+.0%} | {note} |"
        )
    return [
        *lines,
        "",
        f"Fitted: {efficiency.matmul:g} of the matrix products' peak, {1e3 * efficiency.overhead_seconds:g} ms a decoding step.",
    ]


@dataclass(frozen=True, slots=True)
class Held:
    """A published figure of memory, in GB of 10^9 bytes; source: where it stands, and what is compared."""

    name: str
    gigabytes: float
    source: str


@dataclass(frozen=True, slots=True)
class Run:
    """A training run of which `held` is published. moments: bytes of both of an element, over float32's."""

    model: str
    layout: Json
    gpus: int
    recompute: Recompute
    moments: float
    held: Held


BRIDGE = "Megatron-Bridge, skill mbridge-perf-activation-recompute: peak, 8 H100, gradients and moments in bfloat16"
QWEN = "Megatron-Bridge #5123: peak allocated, 16 H100, gradients in bfloat16, experts forced to be balanced"
MOONLIGHT = "Moonlight-16B, TP 2, EP 8, 4,096 tokens"
ON_8: Json = {"tp": 2, "ep": 8}
HELD = (
    Run("moonlight_16b", ON_8, 8, "none", 0.5, Held(MOONLIGHT, 36.62, BRIDGE)),
    Run("moonlight_16b", ON_8, 8, ("mla_up_proj",), 0.5, Held(f"{MOONLIGHT}, mla_up_proj", 35.90, "the same, recomputed")),
    Run("moonlight_16b", ON_8, 8, ("moe_act",), 0.5, Held(f"{MOONLIGHT}, moe_act", 35.94, "the same")),
    Run("qwen3_30b_a3b", {"ep": 16}, 16, "none", 1.0, Held("Qwen3-30B-A3B, EP 16, 4,096 tokens", 62.166 * 1.024**3, QWEN)),
)  # fmt: skip
STAGE = Held(
    "DeepSeek-V3, weights of a stage of PP 16", 86 * 1.024**3, "arXiv 2502.07846: four layers of experts, by arithmetic"
)
NOT_PLANNED = (
    ("Nemotron-3-Nano, 16 H100", "64.65 GB", "no family of this project"),
    ("DeepSeek-V3 on 96 H20, verl", "66 GB, host 1,500 GB", "what beside the trainer is in it is not published"),
    ("DeepSeek-R1 on 128 H100, slime", "host 1,400 to 1,500 GB", "the same"),
    ("Qwen3-30B-A3B, a save, slime", "host 190 GB a rank", "a format that this project does not write"),
    ("Qwen3-30B-A3B, TP 1, EP 8, NeMo RL", "more than 80 GB", "lengths and number of GPUs are not published"),
)


def held_memory() -> list[tuple[Held, float]]:
    """(published, planned GB). Moments are planned in float32."""
    on_the_host()
    from r1mega.plan.rank import measure  # Megatron with it, which seconds do without

    found, optimizer = [], OptimizerConfig(grad_reduce_in_fp32=False)
    for run in HELD:
        hf, layout = _published(run.model), ParallelConfig(**run.layout)
        model = ModelConfig(path=Path("unused"), recompute=run.recompute)
        rank = measure(hf, model, layout, optimizer, world=run.gpus, rank=0, tokens=4096)
        s, (activations,) = rank.static, rank.activations
        moments = (s.exp_avg + s.exp_avg_sq) * run.moments
        total = s.weights + s.gradients + s.main_params + moments + activations.kept + activations.working
        found.append((run.held, total / 1e9))
    layers = layer_parameters(_published("deepseek_v3_671b"))
    return [*found, (STAGE, 2 * sum(map(sum, layers[4:8])) / 1e9)]


def memory_table(found: Iterable[tuple[Held, float]]) -> list[str]:
    """Lines of Markdown."""
    lines = ["| memory | published | planned | off by | what is published |", "|---|---|---|---|---|"]
    for held, planned in found:
        off = planned / held.gigabytes - 1
        missed = "" if abs(off) <= 0.1 else ", **missed**"
        lines.append(
            f"| {held.name} | {held.gigabytes:.1f} GB | {planned:.1f} GB | {off:+.0%}{missed} | {held.source} |"
        )
    return [*lines, *(f"| {name} | {figure} | missing | | {why} |" for name, figure, why in NOT_PLANNED)]


if __name__ == "__main__":
    print("\n".join([*table(), ""]), flush=True)
    print("\n".join(memory_table(held_memory())))
