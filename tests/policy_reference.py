"""Two GRPO steps with transformers and torch.optim.AdamW: what a policy in any layout must reproduce."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from r1mega.types import TrainingSample
from tests.reference import make_hf_model, unfuse

LEARNING_RATE, RATE, TEMPERATURE, KL = 1e-3, 0.01, 0.9, 0.1
SETTINGS = {"weight_decay": 0.1, "clip_grad": 0.05, "beta2": 0.95, "eps": 1e-3}
# eps above the rounding of gradients, or Adam's first steps would have the sign of noise where a gradient is near zero


@dataclass(frozen=True, slots=True)
class Step:
    """log_probs: of each sample's response, before the step; gradients: before clipping, by HF names; norm: theirs."""

    log_probs: list[torch.Tensor]
    loss: float
    norm: float
    gradients: dict[str, torch.Tensor]


@dataclass(slots=True)
class Expected:
    """config: config.json; state, state_after: weights before and after the steps."""

    config: dict[str, Any]
    state: dict[str, torch.Tensor]
    samples: list[TrainingSample]
    steps: list[Step] = field(default_factory=list)
    state_after: dict[str, torch.Tensor] = field(default_factory=dict)


def make_samples(vocabulary: int, seed: int = 0) -> list[TrainingSample]:
    """Eight responses of 1 to 15 tokens; sampler log-probs off by up to a third, so that some ratios are clipped."""
    generator = np.random.default_rng(seed)
    return [
        TrainingSample(
            token_ids=generator.integers(0, vocabulary, prompt + response).astype(np.int32),
            prompt_length=prompt,
            advantage=float(generator.normal()),
            sampler_log_probs=(-math.log(vocabulary) + 0.3 * generator.normal(size=response)).astype(np.float32),
        )
        for prompt, response in ((3, 9), (6, 1), (2, 15), (5, 4), (4, 11), (9, 7), (1, 3), (2, 8))
    ]


def start(config: dict[str, Any], further: dict[str, torch.Tensor] | None = None) -> Expected:
    """Weights and samples, before any step."""
    model = make_hf_model(config)
    state = unfuse({n: t.detach().clone() for n, t in model.state_dict().items()})
    if config["tie_word_embeddings"]:
        state.pop("lm_head.weight", None)
    return Expected(config, state | (further or {}), make_samples(config["vocab_size"]))


def take_grpo_steps(expected: Expected, ratio: str = "token", steps: int = 2) -> None:
    """Fill `expected` in: loss = mean over samples of the mean over tokens of the clipped surrogate and the KL (k3)."""
    config, samples = expected.config, expected.samples
    model = make_hf_model(config)
    routers = [(n, m) for n, m in model.named_modules() if n.endswith("mlp.gate")]
    counts: dict[str, torch.Tensor] = {}
    for name, module in routers:
        module.register_forward_hook(_counter(counts, name, config))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]  # Megatron decays neither norms nor biases
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": SETTINGS["weight_decay"]}, {"params": rest, "weight_decay": 0.0}],
        lr=LEARNING_RATE, betas=(0.9, SETTINGS["beta2"]), eps=SETTINGS["eps"],
    )  # fmt: skip
    reference: list[torch.Tensor] = []
    for _ in range(steps):
        counts.clear()
        log_probs = [_log_probs(model, sample) for sample in samples]
        reference = reference or [lp.detach() for lp in log_probs]
        loss = sum(map(_loss, log_probs, reference, samples, [ratio] * len(samples))) / len(samples)
        optimizer.zero_grad()
        loss.backward()
        gradients = unfuse({n: p.grad.clone() for n, p in model.named_parameters()})
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS["clip_grad"])
        optimizer.step()
        for name, module in routers:
            module.e_score_correction_bias += RATE * torch.sign(counts[name].mean() - counts[name])
        expected.steps.append(Step([lp.detach() for lp in log_probs], float(loss), float(norm), gradients))
    after = unfuse({n: t.detach().clone() for n, t in model.state_dict().items()})
    expected.state_after = {n: t for n, t in after.items() if n in expected.state}


def _log_probs(model: torch.nn.Module, sample: TrainingSample) -> torch.Tensor:
    ids = torch.from_numpy(sample.token_ids.astype(np.int64))
    logits = model(input_ids=ids[None]).logits[0, :-1] / TEMPERATURE
    return logits.log_softmax(-1).gather(1, ids[1:, None])[sample.prompt_length - 1 :, 0]


def _loss(log_probs: torch.Tensor, reference: torch.Tensor, sample: TrainingSample, ratio: str) -> torch.Tensor:
    difference = log_probs - torch.from_numpy(sample.sampler_log_probs)
    if ratio == "sequence":
        difference = difference.mean().expand_as(difference)
    factor = difference.exp()
    surrogate = torch.minimum(factor * sample.advantage, factor.clamp(0.8, 1.2) * sample.advantage)
    gap = reference - log_probs
    return (KL * (gap.exp() - gap - 1) - surrogate).mean()


def _counter(counts: dict[str, torch.Tensor], name: str, config: dict[str, Any]):
    """Counts the tokens of each expert: the best k by score + bias among the groups with the best two experts."""

    def hook(module: torch.nn.Module, inputs: tuple, _output: Any) -> None:
        with torch.no_grad():
            hidden = inputs[0].reshape(-1, config["hidden_size"])
            scores = (hidden @ module.weight.T).sigmoid() + module.e_score_correction_bias
            grouped = scores.view(len(scores), config["n_group"], -1)
            best = grouped.topk(2, dim=-1).values.sum(-1).topk(config["topk_group"], dim=-1).indices
            kept = torch.zeros(grouped.shape[:2]).scatter(1, best, 1.0).bool()
            allowed = torch.where(kept[..., None], grouped, torch.tensor(-torch.inf)).flatten(1)
            chosen = allowed.topk(config["num_experts_per_tok"], dim=-1).indices
            counts[name] = counts.get(name, 0) + torch.bincount(chosen.flatten(), minlength=scores.shape[1]).float()

    return hook
