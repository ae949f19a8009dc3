"""Pure functions on graded samples: pass@1 with its interval, pass@k, majority answers, paired comparisons."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, variance

import numpy as np


@dataclass(frozen=True, slots=True)
class Estimate:
    """A fraction and its confidence interval."""

    value: float
    low: float
    high: float


def pass_at_1(correct: Sequence[Sequence[bool]], confidence: float = 0.95) -> Estimate:
    """Mean over prompts of the share of correct samples, correct[prompt][sample], with an interval clustered by prompt.

    Samples of one prompt are not independent, so the variance is that of the prompts' means. The interval is Wilson's
    with the number of independent samples that this variance amounts to (Korn and Graubard's effective sample size,
    at most the number of samples); unlike mean +- 2 s it stays within [0, 1] and has a width at 0 and 1, where the
    variance says nothing and each prompt counts as one sample. Raises ValueError when a prompt has no sample.
    """
    if not correct or not all(correct):
        raise ValueError("pass@1 needs at least one prompt, and a sample of each")
    means = [math.fsum(samples) / len(samples) for samples in correct]
    value = math.fsum(means) / len(means)
    effective = float(len(means))
    if len(means) > 1 and 0 < value < 1:
        squared_error = variance(means) / len(means)
        samples = sum(len(samples) for samples in correct)
        effective = min(value * (1 - value) / squared_error, samples) if squared_error > 0 else samples
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (value + z * z / (2 * effective)) / (1 + z * z / effective)
    half = z * math.sqrt(value * (1 - value) / effective + (z / (2 * effective)) ** 2) / (1 + z * z / effective)
    return Estimate(value, min(value, max(0.0, centre - half)), max(value, min(1.0, centre + half)))


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that at least one of k samples, drawn without replacement from num_samples of which num_correct are
    correct, is correct: the unbiased estimate 1 - C(n - c, k) / C(n, k) ("Evaluating Large Language Models Trained on
    Code", section 2.1). Raises ValueError unless 1 <= k <= num_samples and 0 <= num_correct <= num_samples.
    """
    if not (1 <= k <= num_samples and 0 <= num_correct <= num_samples):
        raise ValueError(f"pass@{k} of {num_correct} correct among {num_samples} samples is not defined")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority(answers: Sequence[str | None], same: Callable[[str, str], bool]) -> list[int]:
    """Indices of the samples that gave the most frequent answer; empty when none gave an answer.

    An answer joins the first group whose first member it equals by `same`. Ties go to the group that came first.
    """
    groups: dict[str, list[int]] = {}  # by the first member's answer
    for index, answer in enumerate(answers):
        if answer is None:
            continue
        for first, group in groups.items():
            if first == answer or same(first, answer):
                group.append(index)
                break
        else:
            groups[answer] = [index]
    return max(groups.values(), key=len, default=[])  # max keeps the first of equals


@dataclass(frozen=True, slots=True)
class McNemar:
    """Prompts that one side alone got right, and the two-sided exact p-value of so uneven a split by chance."""

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """McNemar's exact test: two systems, one verdict each on the same prompts, in the same order."""
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    discordant = only_first + only_second
    tail = sum(math.comb(discordant, i) for i in range(min(only_first, only_second) + 1)) / 2**discordant
    return McNemar(only_first, only_second, min(1.0, 2 * tail))


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], *, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """Mean of second - first over prompts and its percentile interval, resampling whole prompts.

    first, second: a score a prompt (its mean over samples), in the same order.
    """
    differences = [b - a for a, b in zip(first, second, strict=True)]
    if not differences:
        raise ValueError("a comparison needs at least one prompt that both sides answered")
    generator, count = random.Random(seed), len(differences)
    means = sorted(fmean(generator.choices(differences, k=count)) for _ in range(resamples))
    tail = (1 - confidence) / 2
    low, high = means[math.floor(tail * resamples)], means[math.ceil((1 - tail) * resamples) - 1]
    return Estimate(fmean(differences), low, high)


def sign_flip_test(first: Sequence[float], second: Sequence[float], *, resamples: int = 20_000, seed: int = 0) -> float:
    """Two-sided p-value of the mean of second - first: how often it is as far from 0 when each prompt's difference may
    as well have had the other sign (a permutation test within prompts; with one sample a prompt McNemar's, by chance
    instead of by counting). Of `resamples` flips and the observed one, so never 0.
    """
    differences = np.array([b - a for a, b in zip(first, second, strict=True)], dtype=np.float64)
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    observed = abs(differences.sum()) * (1 - 1e-12)  # sums in another order differ in the last digits
    generator, extreme = np.random.default_rng(seed), 0
    for begin in range(0, resamples, 1000):
        flips = generator.integers(0, 2, size=(min(1000, resamples - begin), len(differences)), dtype=np.int8)
        extreme += int((abs((2.0 * flips - 1.0) @ differences) >= observed).sum())
    return (extreme + 1) / (resamples + 1)
