"""The time model of `r1mega plan` against published steps of GRPO: two constants fitted on some, judged on the others.

python tools/plan_back_test.py        # the table in docs/plan.md
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from r1mega.config.schema import DataConfig, ModelConfig, ParallelConfig, RolloutConfig
from r1mega.config.stages.rl import RLStage, UpdateConfig
from r1mega.plan.generator import generator_memory
from r1mega.plan.gpu import gpu_kind
from r1mega.plan.seconds import Efficiency, plan_seconds
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


def fit(known: list[Point]) -> Efficiency:
    """matmul and overhead_seconds by least squares of relative errors; network and memory stay what they are assumed to be.

    Seconds are linear in 1 / matmul and in overhead_seconds, so that three predictions say all of a point.
    """
    bases = []
    for point in known:
        base = point.predict(Efficiency(matmul=1.0, overhead_seconds=0.0))
        slope = point.predict(Efficiency(matmul=0.5, overhead_seconds=0.0)) - base
        overhead = (point.predict(Efficiency(matmul=1.0, overhead_seconds=0.001)) - base) * 1000
        bases.append((base - slope, slope, overhead, point.seconds))
    choices = itertools.product([m / 100 for m in range(5, 71)], [t / 1e5 for t in range(2, 101)])

    def error(choice: tuple[float, float]) -> float:
        matmul, overhead = choice
        return sum(((a + b / matmul + c * overhead) / seconds - 1) ** 2 for a, b, c, seconds in bases)

    matmul, overhead = min(choices, key=error)
    return Efficiency(matmul=matmul, overhead_seconds=overhead)


def table() -> list[str]:
    """Lines of Markdown."""
    given = points()
    efficiency = fit([point for point in given if point.fitted])
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


if __name__ == "__main__":
    print("\n".join(table()))
