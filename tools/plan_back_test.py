"""`r1mega plan` against published figures: seconds of GRPO steps (two constants fitted on some, judged on the others), and memory.

python tools/plan_back_test.py        # the tables in docs/plan.md
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from r1mega.config.schema import DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, Recompute, RolloutConfig
from r1mega.config.stages.rl import RLStage, UpdateConfig
from r1mega.plan.calibrate import fit
from r1mega.plan.generator import generator_memory
from r1mega.plan.given import on_the_host
from r1mega.plan.gpu import gpu_kind
from r1mega.plan.seconds import Efficiency, layer_parameters, plan_seconds
from r1mega.plan.workload import Lengths, workload

Json = dict[str, Any]

CONFIGS = Path(__file__).parents[1] / "configs"
PROMPT, CV = 150, 0.6
"""Not published: tokens of a prompt of OpenMathInstruct-2, and how far lengths spread."""


@dataclass(frozen=True, slots=True)
class Point:
    """A row of NVIDIA NeMo RL 0.4, docs/about/performance-summary.md: GRPO on DGX H100 in bfloat16, on policy."""

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
    fitted: bool

    def predict(self, efficiency: Efficiency) -> float:
        config = RLStage(
            stage="zero",
            run_dir=Path("unused"),
            model=ModelConfig(path=Path("unused"), recompute="full"),
            parallel=ParallelConfig(**self.layout),
            data=DataConfig(prompts=()),
            rollout=RolloutConfig(
                num_prompts=self.samples // 16, group_size=16, tp=self.generator_tp, max_num_seqs=512,
                max_response_tokens=self.longest - PROMPT, gpu_memory_utilization=0.6,
            ),
            update=UpdateConfig(num_minibatches=self.samples // self.minibatch, microbatch_tokens=self.longest),
        )  # fmt: skip
        gpu, p = gpu_kind("h100-80"), config.parallel
        work = workload(config, Lengths(self.mean - PROMPT, CV, prompt=PROMPT), self.gpus // (p.tp * p.pp * p.cp))
        generator = generator_memory(self.hf, torch.bfloat16, config.rollout, gpu.memory_bytes)
        return plan_seconds(
            config, self.hf, self.gpus, gpu, work, generator, imbalance=1.2, per_node=8, efficiency=efficiency
        ).total


def _published(name: str) -> Json:
    return json.loads((CONFIGS / name / "model/config.json").read_text())


def _dense(kind: str, layers: int, hidden: int, intermediate: int, heads: int, vocabulary: int) -> Json:
    return {
        "model_type": kind, "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": vocabulary,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 40960,
    }  # fmt: skip


def points() -> list[Point]:
    """Of the five, every other one is fitted."""
    deepseek, qwen30 = _published("deepseek_v3_671b"), _published("qwen3_30b_a3b")
    qwen235 = qwen30 | {
        "num_hidden_layers": 94, "hidden_size": 4096, "num_attention_heads": 64, "moe_intermediate_size": 1536,
        "intermediate_size": 12288,
    }  # fmt: skip
    llama, qwen32 = (
        _dense("llama", 32, 4096, 14336, 32, 128256),
        _dense("qwen3", 64, 5120, 25600, 64, 151936),
    )
    deepseek_stages = {"pp": 16, "ep": 16, "layers_per_stage": (*[4] * 15, 1)}
    qwen235_stages = {"tp": 2, "cp": 2, "ep": 16, "pp": 8, "layers_per_stage": (*[12] * 7, 10)}
    return [
        Point("DeepSeek-V3", deepseek, 256, 512, 512, 1536, 745, 32, deepseek_stages, 154, True),
        Point("Qwen3-235B-A22B", qwen235, 128, 512, 512, 8192, 5671, 16, qwen235_stages, 506, False),
        Point("Qwen3-30B-A3B", qwen30, 32, 2048, 512, 4096, 3154, 4, {"tp": 2, "ep": 8}, 225, True),
        Point("Qwen3-32B", qwen32, 32, 2048, 512, 4096, 3206, 4, {"tp": 4, "pp": 4}, 393, False),
        Point("Llama-3.1-8B", llama, 16, 2048, 512, 4096, 1060, 1, {"pp": 2}, 97.7, True),
    ]


def table() -> list[str]:
    """Lines of Markdown."""
    given = points()
    efficiency = fit([(point.predict, point.seconds) for point in given if point.fitted])
    lines = ["| GRPO on H100 | GPUs | published | predicted | off by | |", "|---|---|---|---|---|---|"]
    for point in given:
        predicted = point.predict(efficiency)
        off = predicted / point.seconds - 1
        note = "fitted" if point.fitted else "judged" + ("" if abs(off) <= 0.3 else ", **missed**")
        lines.append(f"| {point.name} | {point.gpus} | {point.seconds:g} s | {predicted:.0f} s | {off:+.0%} | {note} |")
    return [
        *lines,
        "",
        f"Fitted: {efficiency.matmul:g} of the matrix products' peak, {1e3 * efficiency.overhead_seconds:g} ms a layer of a decoding step.",
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
