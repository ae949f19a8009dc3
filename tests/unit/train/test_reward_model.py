"""A reward model's step against transformers' sequence classifier and AdamW; its export as transformers reads it."""

import math

import numpy as np
import pytest
import torch

from r1mega import platform
from r1mega.config.schema import ModelConfig, OptimizerConfig, ParallelConfig

pytestmark = pytest.mark.heavy

platform.prepare()

from r1mega.checkpoint.hf import write_hf  # noqa: E402
from r1mega.model.reward_head import SCORE, classifier_config, initial_head, untied  # noqa: E402
from r1mega.train.policy import Policy  # noqa: E402
from r1mega.train.reward_model import (  # noqa: E402
    PreferenceSample,
    ShardedRewardModel,
    preference_scores,
    preference_step,
)
from r1mega.train.trainer import Trainer  # noqa: E402
from tests.reference import DEEPSEEK, DENSE, make_reference  # noqa: E402
from tests.unit.train.test_supervised import entropies_asked

LEARNING_RATE = 1e-3
EPS = 1e-6
"""Adam's, above the rounding of gradients: else the sign of a rounding error moves a weight by the learning rate."""
MODELS = {
    "deepseek": DEEPSEEK | {"architectures": ["DeepseekV3ForCausalLM"], "rope_interleave": True},
    "qwen3_tied": DENSE
    | {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True, "architectures": ["Qwen3ForCausalLM"]},
}


def make_policy(hf, weights, dtype="float32", log_probs="logits"):
    model = ModelConfig(path="unused", dtype=dtype, log_probs=log_probs)
    policy = Policy(model, untied(hf), ParallelConfig(), seed=1, scalar_head=True)
    policy.load_hf(weights)
    return policy


def make_trainer(policy):
    settings = OptimizerConfig(lr=LEARNING_RATE, eps=EPS, weight_decay=0.1, clip_grad=0.5)
    return Trainer(policy, settings, total_steps=9)


def base_weights(hf):
    """An ordinary language model's weights (its output layer included) and a new head."""
    state = make_reference({k: v for k, v in hf.items() if k != "architectures"}, seed=3, batch=1, length=4).state
    return state | {SCORE: initial_head(hf["hidden_size"], seed=5)}


def make_samples(objective, count=6):
    rng = np.random.default_rng(0)
    samples = []
    for index in range(count):
        sequences = tuple(
            tuple(int(t) for t in rng.integers(3, 90, rng.integers(4, 15)))
            for _ in range(2 if objective == "pairwise" else 1)
        )
        target = float(index % 3) / 2 if objective == "pairwise" else float(index % 2)
        samples.append(PreferenceSample(sequences, target, tuple(map(len, sequences))))
    return samples


def classifier(policy, hf, directory):
    """The export, loaded by transformers; not a tensor may be missing or left over."""
    from transformers import AutoModelForSequenceClassification

    reader = {"template": "nano", "reads": "summary"}
    write_hf(directory, policy.hf_tensors(), classifier_config(hf, reader))
    model, info = AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.num_labels == 1
    return model


def reference_scores(model, sample):
    return torch.cat([model(torch.tensor([sequence])).logits[0] for sequence in sample.sequences])


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_the_exported_classifier(one_rank, tmp_path, name):
    hf, samples = MODELS[name], make_samples("pairwise")
    policy = make_policy(hf, base_weights(hf))
    model = classifier(policy, hf, tmp_path / "hf")
    scores = preference_scores(policy, samples, capacity=64)
    with torch.no_grad():
        expected = torch.stack([reference_scores(model, sample) for sample in samples]).double()
    torch.testing.assert_close(scores, expected, rtol=0, atol=2e-5)
    assert scores.std() > 0.1, "a test of scores that are all alike would see nothing"


def test_scores_and_a_step_in_bfloat16(one_rank, tmp_path):
    """Against float32 on the same rounded weights; as far from it, at most twice, as transformers is in bfloat16."""
    hf, samples = MODELS["qwen3_tied"], make_samples("pairwise")
    policy = make_policy(hf, base_weights(hf), "bfloat16")
    model, coarse = (classifier(policy, hf, tmp_path / "hf") for _ in range(2))
    for parameter in coarse.parameters():
        parameter.data = parameter.data.bfloat16()
    scores = preference_scores(policy, samples, capacity=64)
    with torch.no_grad():
        expected, rounded = (torch.stack([reference_scores(m, s) for s in samples]).double() for m in (model, coarse))
    limit = 2 * float((rounded - expected).abs().max())
    assert 0 < float((scores - expected).abs().max()) <= limit < 0.1 * float(scores.std())
    result = preference_step(make_trainer(policy), samples, range(len(samples)), "pairwise", capacity=48)
    margins = torch.tensor([sample.target for sample in samples]).double()
    pairs = torch.stack([reference_scores(model, sample) for sample in samples]).double()
    loss = -torch.nn.functional.logsigmoid(pairs[:, 0] - pairs[:, 1] - margins).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    assert result.loss == pytest.approx(float(loss), abs=limit)
    assert math.isclose(result.update.grad_norm, float(norm), rel_tol=2**-6)


@pytest.mark.parametrize(
    ("objective", "log_probs"), [("pairwise", "logits"), ("pointwise", "logits"), ("pairwise", "hidden")]
)
def test_two_steps_equal_transformers_and_adamw(one_rank, tmp_path, monkeypatch, objective, log_probs):
    hf, samples = MODELS["deepseek"], make_samples(objective)
    policy = make_policy(hf, base_weights(hf), log_probs=log_probs)
    model = classifier(policy, hf, tmp_path / "before")
    trainer = make_trainer(policy)
    decayed, rest = ([p for p in model.parameters() if (p.ndim > 1) is wanted] for wanted in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=LEARNING_RATE, betas=(0.9, 0.95), eps=EPS,
    )  # fmt: skip
    asked = entropies_asked(policy, monkeypatch)
    for indices in ([0, 1, 2, 3], [5, 2, 4]):
        result = preference_step(trainer, samples, indices, objective, capacity=48)
        losses, right = [], 0
        for sample in (samples[i] for i in indices):
            scores = reference_scores(model, sample).double()
            if objective == "pairwise":
                losses.append(torch.log1p(torch.exp(-(scores[0] - scores[1] - sample.target))))
                right += float(scores[0] > scores[1])
            else:
                p = torch.sigmoid(scores[0])
                losses.append(-torch.log(p if sample.target else 1 - p))
                right += float((p > 0.5) == (sample.target == 1))
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        assert asked and not any(asked)
        assert result.loss == pytest.approx(float(loss), abs=1e-5) and result.accuracy == pytest.approx(
            right / len(indices)
        )
        assert math.isclose(result.update.grad_norm, float(norm), rel_tol=1e-4)
        assert result.work.tokens == sum(samples[i].num_tokens for i in indices)
    after = classifier(policy, hf, tmp_path / "after").state_dict()
    for name, value in model.state_dict().items():
        difference = (after[name] - value).abs()
        assert difference.max() <= 2.1 * LEARNING_RATE * 2, name
        assert difference.mean() <= 2e-2 * LEARNING_RATE, name


def test_another_head_goes_on_and_a_language_model_wants_one(one_rank):
    from r1mega.errors import CheckpointError

    hf = MODELS["deepseek"]
    weights = base_weights(hf)
    policy = make_policy(hf, weights)
    again = dict(policy.hf_tensors())
    assert SCORE in again and "lm_head.weight" not in again and torch.equal(again[SCORE], weights[SCORE])
    policy.load_hf(again)
    del again[SCORE]
    with pytest.raises(CheckpointError, match="missing: score.weight"):
        policy.load_hf(again)


def test_a_model_for_scoring_alone(one_rank, tmp_path):
    """The exported model as a reward in the trainer's layout: transformers' scores, whatever else is asked with them."""
    hf, samples = MODELS["deepseek"], make_samples("pointwise", 9)
    model = classifier(make_policy(hf, base_weights(hf)), hf, tmp_path / "hf")
    settings = ModelConfig(path="unused", dtype="float32", log_probs="hidden")
    sharded = ShardedRewardModel(tmp_path / "hf", settings, ParallelConfig(), capacity=32)
    sequences = [list(sample.sequences[0]) for sample in samples]
    with torch.no_grad():
        expected = [float(reference_scores(model, sample)) for sample in samples]
    assert sharded.scores([*sequences, sequences[2]]) == pytest.approx([*expected, expected[2]], abs=2e-5)
    assert sharded.scores(sequences[::-1]) == sharded.scores(sequences)[::-1]
    assert sharded.scores([]) == []
