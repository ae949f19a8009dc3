"""A tiny DeepSeek-V3 on one rank: its trainer, samples, an update, and the same model of transformers."""

import numpy as np
import torch

from r1mega import platform
from r1mega.algorithm.grpo import grpo_loss
from r1mega.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from r1mega.types import TrainingSample

platform.prepare()


HF = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 67, "hidden_size": 48,
    "intermediate_size": 80, "moe_intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "n_shared_experts": 1, "n_routed_experts": 8, "num_experts_per_tok": 4, "n_group": 4,
    "topk_group": 2, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "first_k_dense_replace": 1, "moe_layer_freq": 1, "q_lora_rank": 24, "kv_lora_rank": 16,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "num_nextn_predict_layers": 0,
    "max_position_embeddings": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rope_interleave": True, "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LEARNING_RATE, TEMPERATURE = 1e-3, 0.8
PRECISION_AWARE = {"precision_aware": True, "grad_reduce_in_fp32": False}


def make_trainer(log_probs="logits", dtype="float32", weights=None, bias_rate=0.0, **optimizer):
    """weights: of the model; None: drawn. bias_rate: of the routers."""
    from r1mega.train.policy import Policy
    from r1mega.train.trainer import Trainer

    model = ModelConfig(path="unused", dtype=dtype, log_probs=log_probs, expert_bias_update_rate=bias_rate)
    policy = Policy(model, HF, ParallelConfig(), seed=1, init_std=0.08)
    if weights is not None:
        policy.load_hf(weights)
    settings = OptimizerConfig(**{"lr": LEARNING_RATE, "weight_decay": 0.1, "clip_grad": 0.05} | optimizer)
    return Trainer(policy, settings, total_steps=10)


def make_samples(seed=0):
    generator = np.random.default_rng(seed)
    samples = []
    for prompt, response in ((3, 5), (6, 1), (2, 9), (4, 4)):
        samples.append(
            TrainingSample(
                token_ids=generator.integers(0, HF["vocab_size"], prompt + response).astype(np.int32),
                prompt_length=prompt,
                advantage=float(generator.normal()),
                sampler_log_probs=(-4 + 0.1 * generator.normal(size=response)).astype(np.float32),
            )
        )
    return samples


def run_update(trainer, samples, packs, algorithm):
    from r1mega.train.samples import minibatch_weights, pack_for_loss

    weights = minibatch_weights(samples, range(len(samples)), algorithm.loss_aggregation, 16)

    def loss(batch, scores):
        value, stats = grpo_loss(scores.values, batch.policy_tokens, clip_low=0.2, clip_high=0.2)
        return value, (value.item(), stats)

    total = sum(s.response_length for s in samples)
    batches = [pack_for_loss(samples, indices, weights) for indices in packs]
    return trainer.update(
        batches,
        loss,
        temperature=TEMPERATURE,
        total_response_tokens=total,
        sums_over="tokens" if algorithm.is_of_tokens else "samples",
    )


def transformers_model(policy, tmp_path):
    from transformers import AutoModelForCausalLM

    from r1mega.checkpoint.hf import write_hf

    write_hf(tmp_path / "hf", policy.hf_tensors(), HF)
    return AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, attn_implementation="eager")


def hub_names(state):
    """transformers 5 stacks the experts; checkpoints on the hub have one tensor each."""
    out = {}
    for name, value in state.items():
        if name.endswith("mlp.experts.gate_up_proj"):
            for expert, both in enumerate(value):
                gate, up = both.chunk(2)
                out[name.replace("gate_up_proj", f"{expert}.gate_proj.weight")] = gate
                out[name.replace("gate_up_proj", f"{expert}.up_proj.weight")] = up
        elif name.endswith("mlp.experts.down_proj"):
            for expert, down in enumerate(value):
                out[name.replace("down_proj", f"{expert}.down_proj.weight")] = down
        else:
            out[name] = value
    return out
