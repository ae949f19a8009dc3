"""Losses of reward models and what their evaluation says: pure functions of scores."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid, softplus


def pairwise_losses(chosen: torch.Tensor, rejected: torch.Tensor, margins: torch.Tensor | float = 0.0) -> torch.Tensor:
    """-log sigmoid(chosen - rejected - margin) of each pair: Bradley-Terry with a margin. All [pairs].

    Llama 2 (section 3.2.2) has the margin; without it this is InstructGPT's loss (section 3.5), which DeepSeek-R1 uses.
    """
    return -logsigmoid(chosen - rejected - margins)


def pointwise_losses(scores: torch.Tensor, safe: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of sigmoid(score) = P(safe). scores: [responses]; safe: [responses], 1 or 0."""
    return softplus(scores) - safe * scores


def accuracy(chosen: torch.Tensor, rejected: torch.Tensor) -> float:
    """Share of pairs in order; a tie counts a half. nan without pairs."""
    if not len(chosen):
        return float("nan")
    return float(((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).mean())


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """Pearson's; nan for fewer than two values, or when one side never changes."""
    first, second = first.double() - first.double().mean(), second.double() - second.double().mean()
    scale = first.norm() * second.norm()
    return float(first @ second / scale) if len(first) > 1 and scale > 0 else float("nan")


def length_bias(
    chosen: torch.Tensor, rejected: torch.Tensor, chosen_lengths: torch.Tensor, rejected_lengths: torch.Tensor
) -> dict[str, float]:
    """How much of a reward model is a length detector. All arguments [pairs].

    length_correlation: of score and length over all responses; accuracy_shorter, accuracy_longer: of the pairs whose
    chosen response is the shorter (longer) one. One that counts tokens has 0 and 1 there.
    """
    shorter, longer = chosen_lengths < rejected_lengths, chosen_lengths > rejected_lengths
    return {
        "length_correlation": correlation(torch.cat([chosen, rejected]), torch.cat([chosen_lengths, rejected_lengths])),
        "accuracy_shorter": accuracy(chosen[shorter], rejected[shorter]),
        "accuracy_longer": accuracy(chosen[longer], rejected[longer]),
    }


def separation(safe: torch.Tensor, unsafe: torch.Tensor) -> float:
    """Chance that a safe response scores above an unsafe one (area under the ROC curve; ties a half). nan if one is
    empty.
    """
    if not len(safe) or not len(unsafe):
        return float("nan")
    above, ties = (safe[:, None] > unsafe).double(), (safe[:, None] == unsafe).double()
    return float((above + 0.5 * ties).mean())
