"""Trainer -> generator, once a step: transfer, then prove."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from r1mega.config.schema import WeightsConfig
from r1mega.errors import WeightSyncError
from r1mega.types import GenerationEngine, WritableEngine
from r1mega.weights import verify
from r1mega.weights.transfer import Trainer, build_transfer

logger = logging.getLogger(__name__)

_MADE_UP_TOKENS = 32


class WeightSync:
    """Pushes the policy's weights into the generator and proves that they arrived; WeightSyncError when not.

    The proof: every tensor's digest as it was sent equals the one read back from the generator's own parameters, and
    both models give the same log-probs to fixed token sequences. Two experts whose router scores agree to the last bits
    can be chosen differently by the two implementations, in float32 about once in 10^5 tokens; so sequences that fail are
    followed by others, once: a fault fails on all, a tie does not. What bfloat16 can promise: see `verify`.
    """

    def __init__(
        self,
        policy: Trainer,
        engine: GenerationEngine,
        config: WeightsConfig,
        hf_config: Mapping[str, Any],
        probe_sequences: Sequence[Sequence[int]],
    ):
        self._policy, self._engine, self._verify = policy, engine, config.verify
        self._transfer = build_transfer(policy, engine, config, hf_config)
        quantised = isinstance(engine, WritableEngine) and (engine.fp8 or engine.fp8_cache)
        self._limit = verify.probe_limit(
            policy.dtype, config.probe_tolerance, fp8=policy.fp8, fp8_generator=quantised
        )  # fmt: skip
        count = (
            config.probe_sequences or verify.NUM_SEQUENCES[torch.bfloat16 if self._limit.share < 1 else policy.dtype]
        )
        given = [list(sequence) for sequence in probe_sequences]
        if self._limit.share < 1:  # where few tokens may tell, all must be able to
            lengths = [max(2, min(len(sequence), _MADE_UP_TOKENS)) for sequence in (given * (2 * count))[: 2 * count]]
            given = verify.made_up_sequences(lengths, hf_config["vocab_size"], seed=0)
        self._sequences, self._further = given[:count], given[count : 2 * count] or given[:count]
        self._log_probs: list[list[list[float]]] = []  # the policy's, of those two, at the last push

    def push(self, arrived: Callable[[], None] = lambda: None, *, again: bool = False) -> dict[str, float]:
        """Make the generator the policy's equal. Wakes the generator up. A collective call.

        again: the policy is what it was at the last push (the generator has lost its weights since): its digest and log-probs
        of then are compared, not computed anew.

        arrived: called when the policy has done its part, of the proof too: its weights may leave the device.
        """
        self._transfer.push()
        digest: dict[str, int] = {}
        if self._verify:
            digest = self._transfer.digest(again=again)
            if not (again and self._log_probs):
                both = (self._sequences, self._further)
                self._log_probs = [self._policy.sequence_log_probs(given) for given in both]
        ours = self._log_probs
        arrived()
        self._engine.wake_up()
        if not self._verify:
            return {}
        verify.compare_digests(digest, self._engine.weights_digest())
        result, error = self._probe(self._sequences, ours[0])
        if _anywhere(error is not None):  # the same sequences on all ranks of a generator
            if error is not None:
                logger.warning("probing again with other sequences, for a router tie would not show there: %s", error)
            result, error = self._probe(self._further, ours[1])
        if error is not None:
            raise error
        return {
            "weights/probe_diff_max": result.max_difference,
            "weights/probe_outlier_fraction": result.outlier_fraction,
        }

    def _probe(self, sequences: list[list[int]], ours: list[list[float]]) -> tuple[Any, WeightSyncError | None]:
        """(ProbeResult, None), or (None, what this rank's generator failed by). ours: the policy's log-probs."""
        try:
            return verify.probe(self._engine, sequences, ours, self._limit), None
        except WeightSyncError as error:
            return None, error


def _anywhere(failed: bool) -> bool:
    """Whether any rank's generator failed: the same answer on all."""
    if not dist.is_initialized():
        return failed
    flag = torch.tensor(int(failed))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)
