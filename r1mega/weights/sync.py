"""Trainer -> generator, once a step: stream, load, prove."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from r1mega.config.schema import WeightsConfig
from r1mega.rollout.engine import GenerationEngine
from r1mega.train.packing import build_microbatch
from r1mega.train.policy import Policy
from r1mega.weights import verify
from r1mega.weights.transfer import DigestTap


class WeightSync:
    """Pushes the policy's weights into the generator and proves that they arrived; WeightSyncError when not.

    The proof: every tensor's digest as it was sent equals the one read back from the generator's own parameters, and
    both models give the same log-probs to fixed token sequences.
    """

    def __init__(
        self,
        policy: Policy,
        engine: GenerationEngine,
        config: WeightsConfig,
        hf_config: Mapping[str, Any],
        probe_sequences: Sequence[Sequence[int]],
    ):
        self._policy, self._engine, self._verify = policy, engine, config.verify
        self._tap = DigestTap(policy.dtype, hf_config)
        self._sequences = [list(sequence) for sequence in probe_sequences[: config.probe_sequences]]
        self._probe_batch = build_microbatch(
            self._sequences, [1] * len(self._sequences), range(len(self._sequences)), policy.pad_multiple
        )
        self._tolerance = config.probe_tolerance or verify.PROBE_TOLERANCES[policy.dtype]

    def push(self) -> dict[str, float]:
        """Make the generator the policy's equal. Wakes the generator up. A collective call."""
        self._engine.update_weights(self._tap(self._policy.hf_tensors()))
        self._engine.wake_up()
        if not self._verify:
            return {}
        verify.compare_digests(self._tap.digest, self._engine.weights_digest())
        result = verify.probe(self._engine, self._sequences, self._trainer_log_probs(), self._tolerance)
        return {"weights/probe_diff_max": result.max_difference}

    def _trainer_log_probs(self) -> list[list[float]]:
        packed, _ = self._policy.log_probs([self._probe_batch])[0]
        return [part.tolist() for part in torch.split(packed, [len(s) - 1 for s in self._sequences])]
