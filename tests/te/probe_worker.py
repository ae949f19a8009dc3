"""The rank of test_probe_fp8.py: planted faults, and how many sets of sequences tell of each; with `stand_in.install` before."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from r1mega import platform

platform.prepare()

from r1mega.config.schema import ModelConfig, ParallelConfig  # noqa: E402
from r1mega.errors import WeightSyncError  # noqa: E402
from r1mega.platform import groups  # noqa: E402
from r1mega.rollout.vllm_engine import VllmEngine  # noqa: E402
from r1mega.train.policy import Policy  # noqa: E402
from r1mega.weights import verify  # noqa: E402
from r1mega.weights.transfer import checkpoint_tensors  # noqa: E402
from tests.unit.rollout.tiny_models import MODELS, checkpoint, settings  # noqa: E402
from tests.unit.weights.test_probe_bfloat16 import LAYER, swap_experts  # noqa: E402

Weights = dict[str, torch.Tensor]
CUT_BY_COLUMNS = ("o_proj.weight", "down_proj.weight")
CUT_BY_ROWS = ("q_b_proj.weight", "kv_b_proj.weight", "gate_proj.weight", "up_proj.weight")


FACTORS = {
    r"model\.embed_tokens\.weight": 32.0,  # is not quantised: routers decide alike
    r".*mlp\.gate\.weight": 4.0,
    r"model\.layers\.2\.mlp\.experts\.\d+\.down_proj\.weight": 64.0,
    r"model\.layers\.3\.self_attn\.o_proj\.weight": 12.0,
    r"lm_head\.weight": 2.0,
}
"""With them the experts of layer 2 and the attention of layer 3 decide what a token becomes."""


def spread_weights(seed: int = 0) -> Weights:
    """Of the tiny DeepSeek model."""
    return {
        name: tensor * next((factor for names, factor in FACTORS.items() if re.fullmatch(names, name)), 1.0)
        for name, tensor in checkpoint_tensors(checkpoint("deepseek", seed))
    }


def miss_a_layer(tensors: Weights) -> None:
    """The layer keeps what it had before: here, another model's."""
    tensors.update({name: tensor for name, tensor in spread_weights(1).items() if name.startswith(LAYER)})


def miss_a_shard(tensors: Weights) -> None:
    """What the second of two tensor-parallel ranks holds of a layer is another model's."""
    for name, tensor in spread_weights(1).items():
        if name.startswith(LAYER) and name.endswith(CUT_BY_COLUMNS + CUT_BY_ROWS):
            axis = 1 if name.endswith(CUT_BY_COLUMNS) else 0
            tensors[name] = torch.cat([tensors[name].chunk(2, axis)[0], tensor.chunk(2, axis)[1]], axis)


def judge(recipes: Sequence[str], num_sets: int) -> dict[str, dict[str, int]]:
    """{recipe: {fault: sets of sequences whose probe fails}}."""
    groups.init_parallel(ParallelConfig(), seed=0)
    engine = VllmEngine(settings("deepseek", dtype="bfloat16", kv_cache_bytes=32 << 20))
    config, lengths = MODELS["deepseek"], [20 + i % 12 for i in range(verify.NUM_SEQUENCES[torch.bfloat16])]
    sets = [verify.made_up_sequences(lengths, config["vocab_size"], seed) for seed in range(num_sets)]
    expected = {recipe: _log_probs(recipe, config, sets) for recipe in recipes}
    limit = verify.probe_limit(torch.bfloat16, fp8=True)

    def refusals(recipe: str) -> int:
        count = 0
        for sequences, ours in zip(sets, expected[recipe], strict=True):
            try:
                verify.probe(engine, sequences, ours, limit)
            except WeightSyncError:
                count += 1
        return count

    found: dict[str, dict[str, int]] = {recipe: {} for recipe in recipes}
    faults: dict[str, Any] = {
        "healthy": lambda tensors: None, "experts exchanged": swap_experts, "layer not loaded": miss_a_layer,
        "shard of tp 2 missing": miss_a_shard,
    }  # fmt: skip
    for fault, plant in faults.items():
        tensors = spread_weights()
        plant(tensors)
        engine.update_weights(tensors.items())
        for recipe in recipes:
            found[recipe][fault] = refusals(recipe)
    engine.update_weights(spread_weights(1).items())
    stale = _derived(engine).clone()
    engine.update_weights(spread_weights().items())
    _derived(engine).copy_(stale)
    for recipe in recipes:
        found[recipe]["stale W_UV"] = refusals(recipe)
        found[recipe]["not as the other recipe"] = sum(
            expected[recipe][i] != expected[recipes[0]][i] for i in range(num_sets)
        )
    engine.close()
    groups.destroy()
    return found


def _derived(engine: VllmEngine) -> torch.Tensor:
    """What vLLM derives from kv_b_proj of layer 3, for decoding."""
    return engine._worker.model_runner.model.model.layers[3].self_attn.mla_attn.mla_attn.W_UV.data


def _log_probs(recipe: str, config: dict[str, Any], sets: list[list[list[int]]]) -> list[list[list[float]]]:
    model = ModelConfig(path=checkpoint("deepseek"), dtype="bfloat16", fp8=recipe)
    policy = Policy(model, config, ParallelConfig(), seed=0)
    policy.load_hf(spread_weights())
    return [policy.sequence_log_probs(sequences) for sequences in sets]
