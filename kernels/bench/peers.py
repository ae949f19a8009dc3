"""Peers that are installed: each computes log-probs (or the loss whose negative they are) of the same targets. One that is
not there, or does not import, is left out, and `left_out` says why."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch

from bench import eager

Way = Callable[..., object]
Loader = Callable[[], Way]

_LEFT_OUT: dict[str, str] = {}


def left_out() -> list[str]:
    """'name (why)' of each peer that was looked for in vain."""
    return [f"{name} ({why})" for name, why in _LEFT_OUT.items()]


def _found(loaders: Mapping[str, Loader]) -> dict[str, Way]:
    found = {}
    for name, load in loaders.items():
        try:
            found[name] = load()
        except (ImportError, AttributeError) as error:  # not installed, without what it needs, or of another version
            _LEFT_OUT[name] = str(error).splitlines()[0]
    return found


def _trl() -> Way:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    return lambda x, t: (selective_log_softmax(x, t), entropy_from_logits(x))


def _liger() -> Way:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    # its forward overwrites the logits with their gradient
    return lambda x, t: LigerCrossEntropyFunction.apply(x, t, None, -100, 0.0, 0.0, "none")[0]


def _liger_from_hidden() -> Way:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return lambda h, w, t: LigerFusedLinearCrossEntropyFunction.apply(h, w, t)[0]


def _verl_kernel() -> Way:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return lambda h, w, t: linear_cross_entropy(h, w, t, 1.0)


def _cce(**options) -> Way:
    # imports Triton on Linux, whatever implementation is asked for
    from cut_cross_entropy import linear_cross_entropy

    return lambda h, w, t: linear_cross_entropy(h, w, t, reduction="none", **options)


def _verl() -> Way:
    from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits_v2

    return lambda x, t: (logprobs_from_logits_v2(x, t), entropy_from_logits(x))


def _verl_chunks() -> Way:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    return lambda h, w, t: FusedLinearForPPO(chunk_size=64)(h, w, t)[0]


def _trl_from_hidden() -> Way:
    from trl.trainer.utils import selective_log_softmax

    return lambda h, w, t: selective_log_softmax(h @ w.t(), t)


def _liger_grpo() -> Way:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    # of sequences of one token, each with its advantage; its mean over tokens
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, compiled=False, chunk_size=64, loss_type="bnpo")
    return lambda h, w, t, a: loss(h[:, None], w, t[:, None], torch.ones_like(t[:, None]), a)[0] * len(t)


@functools.cache
def from_logits() -> dict[str, Way]:
    """{name: f(logits, targets)} on a GPU."""
    compiled: dict[str, Way] = {"torch.compile": torch.compile(eager.log_prob_entropy, dynamic=True)}
    return compiled | _found({"TRL": _trl, "Liger (loss, logits overwritten)": _liger})


@functools.cache
def from_hidden() -> dict[str, Way]:
    """{name: f(hidden, weight, targets)} on a GPU."""
    # the forward of Liger's computes the gradients too
    return _found({"Liger (forward with gradients)": _liger_from_hidden, "verl": _verl_kernel, "Apple CCE": _cce})


@functools.cache
def on_cpu_from_logits() -> dict[str, Way]:
    """{name: f(logits, targets) -> (log-probs, entropies)} of packages' own torch functions."""
    return _found({"TRL": _trl, "verl": _verl})


@functools.cache
def on_cpu_interpreted() -> dict[str, Way]:
    """{name: f(logits, targets) -> losses} of Triton kernels in Triton's interpreter (TRITON_INTERPRET=1 before its import)."""
    return _found({"Liger": _liger})


@functools.cache
def on_cpu_from_hidden() -> dict[str, Way]:
    """{name: f(hidden, weight, targets) -> log-probs}, of CCE's the losses whose negative they are."""
    cce = {"Apple CCE (torch_compile)": functools.partial(_cce, impl="torch_compile")}
    return _found({"TRL": _trl_from_hidden, "verl (chunks)": _verl_chunks, **cce})


@functools.cache
def on_cpu_losses() -> dict[str, Way]:
    """{name: f(hidden, weight, targets, advantages) -> loss}."""
    return _found({"Liger (chunks)": _liger_grpo})
