"""Why the trainer is told which ids `rollout.top_p < 1` keeps: all two-token sequences over five words, enumerated in float64.

The generator samples from, and reports, the distribution of the kept words. Where the trainer's log-probs are over all words the
update is the gradient of no policy's reward, corrected or not; where they are over the kept words, it is that of what samples.
"""

import itertools

import pytest
import torch

from r1mega.algorithm.grpo import PolicyTokens, grpo_loss
from r1mega.rollout.transformers_engine import sampling_log_probs
from r1mega.types import SamplingSettings
from r1mega_kernels import KeptTokens, grouped_log_prob

WORDS = 5
SEQUENCES = list(itertools.product(range(WORDS), repeat=2))


def tables(top_p, **cuts):
    """(logits [start or first word, word], log-probs that the generator samples from and reports)."""
    logits = 1.5 * torch.randn(1 + WORDS, WORDS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return logits, sampling_log_probs(logits, SamplingSettings(1.0, top_p, **cuts))


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


def kept_update(rewards, **cuts):
    """(mean over the generator's sequences of minus the loss's gradient, of log-probs that the kernels find over the kept words; the
    largest distance of an importance weight from 1)."""
    logits, sampler = tables(**cuts)
    logits, largest = logits.requires_grad_(), 0.0
    total = 0.0
    for sequence, reward in zip(SEQUENCES, rewards, strict=True):
        places = steps(sequence)
        reported = torch.stack([sampler[place] for place in places])
        if not (chance := reported.sum().exp()):
            continue
        rows, targets = (torch.tensor(one) for one in zip(*places, strict=True))
        lists = [sampler[row].isfinite().nonzero()[:, 0].int() for row in rows]
        offsets = torch.tensor([0, len(lists[0]), sum(map(len, lists))])
        log_probs, _, _ = grouped_log_prob(
            logits[rows], targets, 1.0, kept=KeptTokens(torch.cat(lists), offsets), backend="reference"
        )
        largest = max(largest, float((log_probs.detach() - reported).exp().sub(1).abs().max()))
        tokens = PolicyTokens(
            advantages=torch.full((2,), reward, dtype=torch.float64), old_log_probs=log_probs.detach(), sampler_log_probs=reported,
            reference_log_probs=None, weights=torch.ones(2, dtype=torch.float64), sequence_ids=torch.zeros(2, dtype=torch.int64),
            num_sequences=1,
        )  # fmt: skip
        loss, _ = grpo_loss(log_probs, tokens, clip_low=0.2, clip_high=0.2, importance_cap=1e9, backend="reference")
        total = total - chance * loss
    total.backward()
    return logits.grad, largest


@pytest.mark.parametrize("cuts", [{"top_p": 0.8}, {"top_p": 1.0, "top_k": 3}, {"top_p": 0.9, "min_p": 0.1, "top_k": 4}])
def test_over_the_kept_words_it_is_the_gradient_of_what_samples(rewards, cuts):
    logits, sampler = tables(**cuts)
    cut = sampler.isinf()
    assert cut.any()
    update, largest = kept_update(rewards, **cuts)
    wanted = objective_gradient(logits, rewards, lambda x: x.masked_fill(cut, float("-inf")).log_softmax(-1))
    assert error(update, wanted) < 1e-6 and largest < 1e-12
    assert (update[cut] == 0).all()
    assert kept_update([1.0] * len(SEQUENCES), **cuts)[0].norm() < 1e-6  # nothing to learn, and nothing is


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
