"""Peers that are installed: each computes log-probs (or the loss whose negative they are) of the same targets."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch

from bench import eager

_MODULES = {"TRL": "trl", "Liger": "liger_kernel", "verl": "verl", "Apple CCE": "cut_cross_entropy"}


def missing() -> list[str]:
    """Names of the peers that are not installed and are left out."""
    return [name for name, module in _MODULES.items() if importlib.util.find_spec(module) is None]


@functools.cache
def from_logits() -> dict[str, Callable]:
    """{name: f(logits, targets)}."""
    found: dict[str, Callable] = {"torch.compile": torch.compile(eager.log_prob_entropy, dynamic=True)}
    if "TRL" not in missing():
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax

        found["TRL"] = lambda x, t: (selective_log_softmax(x, t), entropy_from_logits(x))
    if "Liger" not in missing():
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

        # its forward overwrites the logits with their gradient
        found["Liger (loss, logits overwritten)"] = lambda x, t: LigerCrossEntropyFunction.apply(
            x, t, None, -100, 0.0, 0.0, "none"
        )[0]
    return found


@functools.cache
def from_hidden() -> dict[str, Callable]:
    """{name: f(hidden, weight, targets)}."""
    found: dict[str, Callable] = {}
    if "Liger" not in missing():
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        # its forward computes the gradients too
        found["Liger (forward with gradients)"] = lambda h, w, t: LigerFusedLinearCrossEntropyFunction.apply(h, w, t)[0]
    if "verl" not in missing():
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

        found["verl"] = lambda h, w, t: linear_cross_entropy(h, w, t, 1.0)
    if "Apple CCE" not in missing():
        from cut_cross_entropy import linear_cross_entropy as cce

        found["Apple CCE"] = lambda h, w, t: cce(h, w, t, reduction="none")
    return found
