"""Two GRPO steps with transformers and torch.optim.AdamW: what a policy in any layout must reproduce.

bfloat16: the weights that a forward pass sees are rounded ones, AdamW moves float32 copies; everything else is computed
in float32, and that is what is expected. How far from it rounding may lead is measured, not guessed: transformers takes
the same steps with bfloat16 activations. What rounding would decide is kept out of it: experts are dictated, and no ratio
is near where it is clipped, before either step.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from r1mega.types import KeptIds, TrainingSample
from tests.reference import make_hf_model, unfuse

LEARNING_RATE, RATE, TEMPERATURE = 1e-3, 0.01, 0.9
CLIP_LOW, CLIP_HIGH = 0.8, 1.2
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
    """config: config.json; state, state_after: weights before and after the steps; kl_coefficient: of the loss;
    rounded_steps: the steps with bfloat16 activations (empty in float32)."""

    config: dict[str, Any]
    dtype: str
    state: dict[str, torch.Tensor]
    samples: list[TrainingSample]
    kl_coefficient: float
    steps: list[Step] = field(default_factory=list)
    rounded_steps: list[Step] = field(default_factory=list)
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


def _drawn_from_few(sample: TrainingSample, vocabulary: int, seed: int) -> TrainingSample:
    """Each token from its own 1 to 12 ids."""
    generator = np.random.default_rng(seed)
    lists = [
        np.unique([token, *generator.integers(0, vocabulary, generator.integers(0, 12))])
        for token in sample.token_ids[sample.prompt_length :]
    ]
    kept = KeptIds.of(lists)
    sampler = 0.3 * generator.normal(size=len(kept)) - np.log(kept.counts)
    return dataclasses.replace(sample, kept=kept, sampler_log_probs=sampler.astype(np.float32))


def start(
    config: dict[str, Any],
    further: dict[str, torch.Tensor] | None = None,
    dtype: str = "float32",
    ratio: str = "token",
    kept: bool = False,
) -> Expected:
    """Weights and samples, before any step. ratio: which one the steps will clip; kept: tokens are drawn from a few ids."""
    model = make_hf_model(config)
    state = unfuse({n: t.detach().clone() for n, t in model.state_dict().items()}) | (further or {})
    if config["tie_word_embeddings"]:
        state.pop("lm_head.weight", None)
    samples = make_samples(config["vocab_size"])
    if kept:
        samples = [_drawn_from_few(sample, config["vocab_size"], seed) for seed, sample in enumerate(samples)]
    dictated = dtype == "bfloat16" and "n_routed_experts" in config
    if dictated:
        samples = [_dictate(sample, config, seed) for seed, sample in enumerate(samples)]
    if dtype == "bfloat16":
        routing = _Routing(config, _round(model, model.named_parameters(), dtype, torch.float32))
        samples = [_far_from_clipping(sample, model, routing, ratio, seed) for seed, sample in enumerate(samples)]
    # a policy's reference chooses its experts itself
    return Expected(
        config, dtype, {n: rounded(n, t, dtype) for n, t in state.items()}, samples, 0.0 if dictated else 0.1
    )


def rounded(name: str, weight: torch.Tensor, dtype: str) -> torch.Tensor:
    """float32 values of a weight as a model of this dtype holds it; the routers' bias is float32 in any."""
    return weight if name.endswith("e_score_correction_bias") else weight.to(getattr(torch, dtype)).float()


def any_experts(tokens: int, layers: int, experts: int, top_k: int, seed: int) -> np.ndarray:
    """[tokens, layers, top_k] uint8: any different experts for each token."""
    every = np.tile(np.arange(experts), (tokens, layers, 1))
    return np.random.default_rng(seed).permuted(every, axis=2)[..., :top_k].astype(np.uint8)


def _dictate(sample: TrainingSample, config: dict[str, Any], seed: int) -> TrainingSample:
    layers = config["num_hidden_layers"] - config["first_k_dense_replace"]
    sizes = len(sample.token_ids) - 1, layers, config["n_routed_experts"], config["num_experts_per_tok"]
    return dataclasses.replace(sample, routed_experts=any_experts(*sizes, seed))


@torch.no_grad()
def _far_from_clipping(
    sample: TrainingSample, model: torch.nn.Module, routing: _Routing, ratio: str, seed: int
) -> TrainingSample:
    """Ratios of 2 or 1/2, of each token or of the whole sequence. (A ratio of 1 may drift to its bound in one step.)"""
    log_probs = _log_probs(model, sample, routing).numpy()
    size = 1 if ratio == "sequence" else log_probs.shape
    offsets = np.random.default_rng(seed).choice([-math.log(2), math.log(2)], size=size)
    return dataclasses.replace(sample, sampler_log_probs=(log_probs - offsets).astype(np.float32))


@torch.no_grad()
def _round(
    model: torch.nn.Module, weights: Iterable[tuple[str, torch.Tensor]], dtype: str, compute: torch.dtype
) -> list[torch.nn.Module]:
    """Give the model these weights, rounded to `dtype`, to compute in `compute`; its routers."""
    for (_, parameter), (name, weight) in zip(model.named_parameters(), weights, strict=True):
        parameter.data = rounded(name, weight.detach(), dtype).to(compute, copy=True)
    return [module for name, module in model.named_modules() if name.endswith("mlp.gate")]


def take_grpo_steps(expected: Expected, ratio: str = "token", steps: int = 2) -> None:
    """Fill `expected` in: loss = mean over samples of the mean over tokens of the clipped surrogate and the KL (k3)."""
    expected.steps, state = _grpo_steps(expected, ratio, steps, torch.float32)
    expected.state_after = {n: rounded(n, t, expected.dtype) for n, t in state.items() if n in expected.state}
    if expected.dtype == "bfloat16":
        expected.rounded_steps, _ = _grpo_steps(expected, ratio, steps, torch.bfloat16)
        limits = allowed(expected)
        for number, step in enumerate(expected.steps, 1):
            distance, limit = _distance_from_clipping(step, expected.samples, ratio), limits[f"log_probs {number}"]
            assert distance > 2 * limit, f"step {number}: rounding may decide what is clipped: {distance} of {limit}"


def _distance_from_clipping(step: Step, samples: list[TrainingSample], ratio: str) -> float:
    """The least between the logarithm of a ratio and that of the bound at which its advantage lets it be clipped."""
    distances = []
    for log_probs, sample in zip(step.log_probs, samples, strict=True):
        difference = log_probs - torch.from_numpy(sample.sampler_log_probs)
        if ratio == "sequence":
            difference = difference.mean()
        bound = math.log(CLIP_HIGH if sample.advantage > 0 else CLIP_LOW)
        distances.append(float((difference - bound).abs().min()))
    return min(distances)


def allowed(expected: Expected) -> dict[str, float]:
    """The largest differences that a policy may show, by the names that `policy_worker.compare` gives them.

    float32: 1e-5. bfloat16: for the largest error of a log-prob two and a half times that of the rounded steps (by another CPU's
    products it was 2.02 times), for that of a gradient twice (at most a tenth of its largest element),
    their mean error of a log-prob for the loss (a mean of them; or twice their error of it), one spacing of bfloat16
    (2^-7) for the norm; of the weights one in twenty may be rounded the other way, by one spacing and a twentieth of the learning rate.
    """
    limits: dict[str, float] = {"weights": 1e-5, "unequal weights": 0.05}
    if expected.dtype == "bfloat16":
        limits["weights"] = LEARNING_RATE / 20
    for number, step in enumerate(expected.steps, 1):
        limits |= dict.fromkeys((f"{name} {number}" for name in ("log_probs", "loss", "norm", "gradients")), 1e-5)
        if expected.dtype == "bfloat16":
            coarse = expected.rounded_steps[number - 1]
            errors = torch.cat([(a - b).abs() for a, b in zip(step.log_probs, coarse.log_probs, strict=True)])
            gradients = [
                (coarse.gradients[n] - g).abs().max() / g.abs().max().clamp(min=1e-6) for n, g in step.gradients.items()
            ]
            limits |= {
                f"log_probs {number}": 2.5 * float(errors.max()), f"gradients {number}": min(0.1, 2 * float(max(gradients))),
                f"loss {number}": max(float(errors.mean()), 2 * abs(coarse.loss - step.loss)), f"norm {number}": 2**-7,
            }  # fmt: skip
    return limits


def _grpo_steps(
    expected: Expected, ratio: str, steps: int, compute: torch.dtype
) -> tuple[list[Step], dict[str, torch.Tensor]]:
    """(the steps, computed in `compute`; AdamW's weights after them)."""
    config, samples = expected.config, expected.samples
    model = make_hf_model(config)
    named = {
        name: torch.nn.Parameter(rounded(name, p.detach(), expected.dtype).clone())
        for name, p in model.named_parameters()
    }
    routers = _round(model, named.items(), expected.dtype, compute)
    routing = _Routing(config, routers)
    decayed = [p for p in named.values() if p.ndim > 1]
    rest = [p for p in named.values() if p.ndim == 1]  # Megatron decays neither norms nor biases
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": SETTINGS["weight_decay"]}, {"params": rest, "weight_decay": 0.0}],
        lr=LEARNING_RATE, betas=(0.9, SETTINGS["beta2"]), eps=SETTINGS["eps"],
    )  # fmt: skip
    reference: list[torch.Tensor] = []
    taken = []
    for _ in range(steps):
        if not reference:
            with torch.no_grad():
                reference = [_log_probs(model, sample, routing) for sample in samples]
        routing.counts.clear()
        log_probs, loss = [], 0.0
        optimizer.zero_grad()
        for sample, before in zip(samples, reference, strict=True):  # gradients of the samples are added in float32
            log_probs.append(_log_probs(model, sample, routing))
            part = _loss(log_probs[-1], before, sample, ratio, expected.kl_coefficient) / len(samples)
            model.zero_grad()
            part.backward()
            loss += float(part)
            for name, parameter in model.named_parameters():
                gradient = torch.zeros_like(named[name]) if parameter.grad is None else parameter.grad.float()
                named[name].grad = gradient if named[name].grad is None else named[name].grad + gradient
        gradients = unfuse({n: p.grad.clone() for n, p in named.items()})
        norm = torch.nn.utils.clip_grad_norm_(named.values(), SETTINGS["clip_grad"])
        optimizer.step()
        _round(model, named.items(), expected.dtype, compute)
        for index, module in enumerate(routers):
            counts = routing.counts[index]
            module.e_score_correction_bias += RATE * torch.sign(counts.mean() - counts)
        taken.append(Step([lp.detach() for lp in log_probs], loss, float(norm), gradients))
    biases = {n: t for n, t in model.state_dict().items() if n not in named}
    return taken, unfuse({n: p.detach().clone() for n, p in named.items()} | biases)


def _log_probs(model: torch.nn.Module, sample: TrainingSample, routing: _Routing) -> torch.Tensor:
    ids = torch.from_numpy(sample.token_ids.astype(np.int64))
    routing.follow(sample.routed_experts)
    logits = model(input_ids=ids[None]).logits[0, sample.prompt_length - 1 : -1].float() / TEMPERATURE
    if sample.kept is not None:
        lists = np.split(sample.kept.ids, sample.kept.counts.cumsum()[:-1])
        mask = torch.ones_like(logits, dtype=torch.bool)
        for row, one in zip(mask, lists, strict=True):
            row[one.tolist()] = False
        logits = logits.masked_fill(mask, -math.inf)
    return logits.log_softmax(-1).gather(1, ids[sample.prompt_length :, None])[:, 0]


def _loss(
    log_probs: torch.Tensor, reference: torch.Tensor, sample: TrainingSample, ratio: str, kl_coefficient: float
) -> torch.Tensor:
    difference = log_probs - torch.from_numpy(sample.sampler_log_probs)
    if ratio == "sequence":
        difference = difference.mean().expand_as(difference)
    factor = difference.exp()
    surrogate = torch.minimum(factor * sample.advantage, factor.clamp(CLIP_LOW, CLIP_HIGH) * sample.advantage)
    gap = reference - log_probs
    return (kl_coefficient * (gap.exp() - gap - 1) - surrogate).mean()


class _Routing:
    """Watches transformers' routers: counts the tokens of each expert, dictates experts where a sample names them."""

    def __init__(self, config: dict[str, Any], routers: list[torch.nn.Module]):
        self.counts: dict[int, torch.Tensor] = {}
        self._config, self._chosen = config, None
        for index, router in enumerate(routers):
            router.register_forward_hook(functools.partial(self._hook, index))

    def follow(self, chosen: np.ndarray | None) -> None:
        """[tokens - 1, layers, top-k]; the last token goes to the first experts, as in a microbatch. None: their own."""
        self._chosen = None
        if chosen is not None:
            last = np.broadcast_to(np.arange(chosen.shape[2]), (1, *chosen.shape[1:]))
            self._chosen = torch.from_numpy(np.concatenate([chosen, last]).astype(np.int64))

    def _hook(self, index: int, router: torch.nn.Module, inputs: tuple, outputs: tuple) -> tuple:
        logits, weights, chosen = outputs
        if self._chosen is None:
            chosen = self._best(router, inputs[0])
        else:
            chosen = self._chosen[:, index]
            weights = logits.sigmoid().gather(1, chosen)
            weights = weights / weights.sum(-1, keepdim=True) * self._config["routed_scaling_factor"]
            outputs = logits, weights, chosen
        experts = self._config["n_routed_experts"]
        self.counts[index] = self.counts.get(index, 0) + torch.bincount(chosen.flatten(), minlength=experts).float()
        return outputs

    @torch.no_grad()
    def _best(self, router: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The best k by score + bias among the groups with the best two experts."""
        config, hidden = self._config, hidden.reshape(-1, self._config["hidden_size"])
        scores = (hidden @ router.weight.T).sigmoid() + router.e_score_correction_bias
        grouped = scores.view(len(scores), config["n_group"], -1)
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(config["topk_group"], dim=-1).indices
        kept = torch.zeros(grouped.shape[:2]).scatter(1, best, 1.0).bool()
        allowed = torch.where(kept[..., None], grouped, torch.tensor(-torch.inf)).flatten(1)
        return allowed.topk(config["num_experts_per_tok"], dim=-1).indices
