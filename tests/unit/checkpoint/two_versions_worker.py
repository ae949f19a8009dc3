"""Runs in the interpreter that starts this, one after the other: `save DIR DTYPE` or `continue DIR DTYPE`, and so on.

Prints the following steps of each, as a JSON list.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import torch

from r1mega import platform
from r1mega.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from r1mega.platform import groups
from tests.reference import DEEPSEEK

HF = DEEPSEEK | {"num_hidden_layers": 2, "num_nextn_predict_layers": 1, "architectures": ["DeepseekV3ForCausalLM"]}


def step(trainer) -> list[float]:
    """[gradient norm, losses ...] of one update on the same two microbatches."""
    from r1mega.train.packing import build_microbatch

    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(3, 96, (length,), generator=generator).tolist() for length in (13, 7, 19)]
    batches = [build_microbatch([tokens[i] for i in pack], [2] * len(pack), pack) for pack in ([0, 1], [2])]
    total = sum(b.rows.numel() for b in batches)

    def loss(_batch, scores):
        value = -scores.values.sum() / total
        return value, float(value)

    result = trainer.update(batches, loss, total_response_tokens=total, mtp_loss=True)
    return [result.grad_norm, *result.statistics]


def weight(count: int) -> torch.Tensor:
    """Another for each place, so that a sum sees a change of sign and of order."""
    return torch.linspace(1, 2, count, dtype=torch.float64).cos()


def run(action: str, directory: Path, dtype: str) -> dict:
    from r1mega.checkpoint.store import CheckpointStore, deciding_keys
    from r1mega.train.policy import Policy
    from r1mega.train.trainer import Trainer

    groups.init_parallel(ParallelConfig(), seed=0)
    model = ModelConfig(
        path="unused", dtype=dtype, mtp_loss_coefficient=0.3, expert_bias_update_rate=1e-3,
        sequence_aux_loss_coefficient=0.01,
    )  # fmt: skip
    optimizer = OptimizerConfig(lr=1e-3, weight_decay=0.1, clip_grad=0.5, warmup_steps=3)
    policy = Policy(model, HF, ParallelConfig(), seed=1, init_std=0.08)
    policy.take_reference()
    trainer = Trainer(policy, optimizer, total_steps=10)
    store = CheckpointStore(directory, keep=2, architecture=deciding_keys(HF))
    if action == "save":
        for _ in range(2):
            step(trainer)
        store.save(2, trainer.sharded_state(is_loading=False), {})
    else:
        state, _ = store.load(store.latest(), trainer.sharded_state(is_loading=True))
        trainer.load_sharded_state(state)
    steps = [step(trainer) for _ in range(2)]
    sums = {name: float(value.double().flatten() @ weight(value.numel())) for name, value in policy.hf_tensors()}
    groups.destroy()
    return {"version": metadata.version("megatron-core"), "steps": steps, "sums": sums}


if __name__ == "__main__":
    platform.prepare()
    torch.set_num_threads(1)
    asked = zip(sys.argv[1::3], map(Path, sys.argv[2::3]), sys.argv[3::3], strict=True)
    print(json.dumps([run(*each) for each in asked]))
