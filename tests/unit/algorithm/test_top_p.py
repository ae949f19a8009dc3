"""Why `rollout.top_p < 1` is refused beside an importance ratio: all two-token sequences over five words, enumerated.

The generator samples from, and reports, the distribution of the kept words; the trainer knows that of all words.
"""

import itertools

import pytest
import torch

from r1mega.algorithm.grpo import PolicyTokens, grpo_loss
from r1mega.rollout.transformers_engine import sampling_log_probs
from r1mega.types import SamplingSettings

WORDS = 5
SEQUENCES = list(itertools.product(range(WORDS), repeat=2))


def tables(top_p):
    """(logits [start or first word, word], log-probs that the generator samples from and reports)."""
    logits = 1.5 * torch.randn(1 + WORDS, WORDS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return logits, sampling_log_probs(logits, SamplingSettings(1.0, top_p))


def steps(sequence):
    """(row, word) of each token."""
    return [(0, sequence[0]), (1 + sequence[0], sequence[1])]


def objective_gradient(logits, rewards, log_probs_of):
    """Of the expected reward, by the sum over all sequences."""
    logits = logits.clone().requires_grad_()
    log_probs = log_probs_of(logits)
    chances = [sum(log_probs[step] for step in steps(s)).exp() for s in SEQUENCES]
    sum(c * r for c, r in zip(chances, rewards, strict=True)).backward()
    return logits.grad


def expected_update(top_p, rewards, divide_by_kept_mass=False):
    """(mean over the generator's sequences of minus the loss's gradient, mean importance weight)."""
    logits, sampler = tables(top_p)
    kept_mass = (logits.log_softmax(-1) - sampler).masked_fill(sampler.isinf(), float("-inf")).amax(-1)  # log of it
    logits = logits.requires_grad_()
    total, mean_weight = 0.0, 0.0
    for sequence, reward in zip(SEQUENCES, rewards, strict=True):
        places = steps(sequence)
        reported = torch.stack([sampler[place] for place in places])
        chance = reported.sum().exp()
        if not chance:
            continue
        if divide_by_kept_mass:
            reported = reported + torch.stack([kept_mass[row] for row, _ in places])
        log_probs = torch.stack([logits.log_softmax(-1)[place] for place in places])
        tokens = PolicyTokens(
            advantages=torch.full((2,), reward, dtype=torch.float64), old_log_probs=log_probs.detach(), sampler_log_probs=reported,
            reference_log_probs=None, weights=torch.ones(2, dtype=torch.float64), sequence_ids=torch.zeros(2, dtype=torch.int64),
            num_sequences=1,
        )  # fmt: skip
        loss, _ = grpo_loss(log_probs, tokens, clip_low=0.2, clip_high=0.2, importance_cap=1e9, backend="reference")
        total = total - chance * loss
        mean_weight += float(chance * (log_probs.detach() - reported).exp().mean())
    total.backward()
    return logits.grad, mean_weight


def error(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture
def rewards():
    return torch.rand(len(SEQUENCES), dtype=torch.float64, generator=torch.Generator().manual_seed(1)).tolist()


def test_without_truncation_the_update_is_the_gradient_of_the_expected_reward(rewards):
    logits, _ = tables(1.0)
    update, weight = expected_update(1.0, rewards)
    assert error(update, objective_gradient(logits, rewards, lambda x: x.log_softmax(-1))) < 1e-6
    assert weight == pytest.approx(1)


def test_with_truncation_it_is_that_of_no_policy_corrected_or_not(rewards):
    logits, sampler = tables(0.8)
    whole = objective_gradient(logits, rewards, lambda x: x.log_softmax(-1))
    kept = objective_gradient(logits, rewards, lambda x: x.masked_fill(sampler.isinf(), float("-inf")).log_softmax(-1))
    biased, weight = expected_update(0.8, rewards)
    corrected, corrected_weight = expected_update(0.8, rewards, divide_by_kept_mass=True)
    assert weight < 0.95, "every weight is short by the mass of the words that were kept"
    assert corrected_weight == pytest.approx(1)
    errors = {(name, of): error(found, wanted) for name, found in (("as it is", biased), ("corrected", corrected))
              for of, wanted in (("all words", whole), ("kept words", kept))}  # fmt: skip
    assert min(errors.values()) > 0.1, errors


def test_the_kept_mass_is_not_all_that_is_wrong():
    """All rewards equal: there is nothing to learn, and yet the corrected update moves words into the kept set."""
    equal = [1.0] * len(SEQUENCES)
    assert expected_update(1.0, equal)[0].norm() < 1e-6
    update, _ = expected_update(0.8, equal, divide_by_kept_mass=True)
    _, sampler = tables(0.8)
    assert update.norm() > 0.1
    assert (update[sampler.isinf()] <= 1e-9).all() and update[sampler.isinf()].sum() < -0.1
