"""The proof of a weight transfer: equal digests, then equal log-probs on fixed tokens.

The digest shows that the generator's parameters hold the bits that the trainer sent: it finds a missing, swapped,
permuted or altered tensor and a generator that was not updated. It cannot see what both sides share: tensors exported
wrongly, or packed wrongly for the kernels after they were read back. The probe can: it compares what the two models
compute. In float32 every log-prob must agree. In bfloat16 single ones cannot: two experts whose scores are closer than
rounding are chosen differently by two implementations, and that token is off by as much as several nats; so a share of
the log-probs must agree, over more sequences, and the bits remain the digest's to prove.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from r1mega.errors import WeightSyncError
from r1mega.types import GenerationRequest, Response, SamplingSettings


@dataclass(frozen=True, slots=True)
class ProbeLimit:
    """At least `share` of the log-probs must agree to `tolerance`; the others may be anything finite.

    beyond: a log-prob that is more than so many nats below 0 may be off by more, in proportion, as rounding of the
    logits is. decode_tolerance: of the generator's two paths against each other, where it is another.
    """

    tolerance: float
    share: float = 1.0
    beyond: float = math.inf
    decode_tolerance: float | None = None

    def allowed(self, log_prob: float) -> float:
        """How far from this log-prob another may be."""
        return self.tolerance * max(1.0, abs(log_prob) / self.beyond)

    def of_decoding(self) -> ProbeLimit:
        """That of decoded tokens against the same as a prompt, both by the generator."""
        return self if self.decode_tolerance is None else replace(self, tolerance=self.decode_tolerance)


PROBE_LIMITS = {torch.float32: ProbeLimit(2e-4), torch.bfloat16: ProbeLimit(0.15, share=0.9, beyond=4.0)}
"""By the dtype of policy and generator. docs/resharding.md has the error rates that the bfloat16 figures lead to."""
FP8_LIMIT = ProbeLimit(0.4, share=0.9, beyond=4.0, decode_tolerance=0.15)
"""Of a policy that computes in FP8 beside a generator that does not, and whose two paths are as near as in bfloat16. Chosen by
the runs and the error rates in docs/fp8.md."""
NUM_SEQUENCES = {torch.float32: 2, torch.bfloat16: 16}
"""How many sequences are probed: a share wants more of them than a maximum."""
_MAX_NAMED = 20


def probe_limit(
    dtype: torch.dtype, tolerance: float | None = None, *, fp8: bool = False, fp8_generator: bool = False
) -> ProbeLimit:
    """That of a dtype, or of FP8 beside it; with another tolerance if one is given (weights.probe_tolerance). fp8: of the policy;
    fp8_generator: of weights or KV cache in 8 bits, whose two paths are then as far apart as it is from the policy.
    """
    limit = FP8_LIMIT if fp8 or fp8_generator else PROBE_LIMITS[dtype]
    if fp8_generator:
        limit = replace(limit, decode_tolerance=None)
    return limit if tolerance is None else replace(limit, tolerance=tolerance, decode_tolerance=None)


class Probed(Protocol):
    """What the probe needs of a generator (`rollout.engine.GenerationEngine` has it)."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[tuple[Response, ...]]: ...
    def prompt_log_probs(self, sequences: Sequence[Sequence[int]]) -> list[tuple[float, ...]]: ...


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """max_difference: |generator - trainer| over all probed tokens, outlier_fraction: share of them beyond the tolerance;
    decode_difference: the generator's decoding path against its own prompt path (0 when it was not compared)."""

    max_difference: float
    outlier_fraction: float
    decode_difference: float


def compare_digests(trainer: Mapping[str, int], generator: Mapping[str, int]) -> None:
    """Raises WeightSyncError naming every tensor that one side lacks or whose bits differ."""
    problems = [f"{name}: the trainer did not send it" for name in generator if name not in trainer]
    problems += [f"{name}: the generator does not hold it" for name in trainer if name not in generator]
    problems += [
        f"{name}: digest {generator[name]:016x} in the generator, {digest:016x} in the trainer"
        for name, digest in trainer.items()
        if name in generator and generator[name] != digest
    ]
    if problems:
        raise WeightSyncError(
            f"the generator does not hold the trainer's weights; {len(problems)} of "
            f"{len(set(trainer) | set(generator))} tensors differ:\n  " + _shortened(problems)
        )


def made_up_sequences(lengths: Sequence[int], vocabulary: int, seed: int) -> list[list[int]]:
    """Sequences of tokens drawn evenly. A trained model is sure of what follows in an ordinary prompt, and then wrong
    weights change its log-probs by nothing that bfloat16 shows; after these it is not sure of anything.
    """
    generator = random.Random(seed)
    return [[generator.randrange(vocabulary) for _ in range(length)] for length in lengths]


def probe(
    engine: Probed,
    sequences: Sequence[Sequence[int]],
    trainer_log_probs: Sequence[Sequence[float]],
    limit: ProbeLimit,
    decode_tokens: int = 4,
) -> ProbeResult:
    """Compares the generator's log-probs of fixed tokens with the trainer's (temperature 1, len - 1 values each).

    Prompts run through other kernels and other derived weights than decoding does (MLA absorbs kv_b_proj when it
    decodes); so each sequence's last `decode_tokens` are also decoded greedily and compared with the same tokens as a
    prompt. decode_tokens=0 leaves that out. Raises WeightSyncError naming the worst positions.
    """
    found = engine.prompt_log_probs(sequences)
    compared = _Comparison("trainer", limit)
    for index, (ours, theirs) in enumerate(zip(trainer_log_probs, found, strict=True)):
        compared.add(ours, theirs, f"sequence {index}", 1)
    decoded = _Comparison("its own prompt path", limit.of_decoding())
    if decode_tokens:
        prompts = [tuple(sequence[: max(1, len(sequence) - decode_tokens)]) for sequence in sequences]
        sampling = SamplingSettings(temperature=0.0, max_tokens=decode_tokens)
        responses = [
            samples[0] for samples in engine.generate([GenerationRequest(prompt, 1, 0, sampling) for prompt in prompts])
        ]
        again = engine.prompt_log_probs(
            [(*prompt, *response.token_ids) for prompt, response in zip(prompts, responses, strict=True)]
        )
        for index, (prompt, response, values) in enumerate(zip(prompts, responses, again, strict=True)):
            decoded.add(values[len(prompt) - 1 :], response.log_probs, f"sequence {index} decoded", len(prompt))
    problems = compared.problems() + decoded.problems()
    if problems:
        problems.sort(key=lambda problem: -problem[0])
        more = f", where {1 - limit.share:.0%} may" if limit.share < 1 else ""
        if limit.decode_tolerance is not None:
            more = f" (decoded: {limit.decode_tolerance:g}){more}"
        raise WeightSyncError(
            f"the generator does not compute what the trainer computes: {len(problems)} log-probs of "
            f"{compared.count + decoded.count} differ by more than {limit.tolerance:g}{more}, worst "
            "first:\n  " + _shortened([text for _, text in problems])
        )
    return ProbeResult(compared.worst, compared.outlier_fraction, decoded.worst)


class _Comparison:
    """Log-probs of one path against those of another, all sequences together."""

    def __init__(self, source: str, limit: ProbeLimit):
        self._source, self._limit = source, limit
        self._beyond: list[tuple[float, str]] = []
        self.count, self.worst = 0, 0.0

    def add(self, reference: Sequence[float], found: Sequence[float], where: str, offset: int) -> None:
        """A sequence's values; offset: the position of the first."""
        if len(reference) != len(found):
            raise WeightSyncError(
                f"{where}: {len(found)} log-probs from the generator, {len(reference)} from {self._source}"
            )
        for position, (a, b) in enumerate(zip(reference, found, strict=True)):
            difference = abs(a - b)
            if not (math.isfinite(difference) and difference <= self._limit.allowed(a)):
                order = difference if math.isfinite(difference) else math.inf
                text = f"{where}, token {position + offset}: {b:.6f} in the generator, {a:.6f} by {self._source}"
                self._beyond.append((order, text))
            self.worst = max(self.worst, difference)
        self.count += len(found)

    @property
    def outlier_fraction(self) -> float:
        return len(self._beyond) / max(self.count, 1)

    def problems(self) -> list[tuple[float, str]]:
        """(size, description) of the values beyond the tolerance, if they are more than the limit's share leaves."""
        is_broken = any(order == math.inf for order, _ in self._beyond)
        return self._beyond if is_broken or self.outlier_fraction > 1 - self._limit.share + 1e-12 else []


def _shortened(lines: list[str]) -> str:
    rest = len(lines) - _MAX_NAMED
    return "\n  ".join(lines[:_MAX_NAMED] + ([f"... and {rest} more"] if rest > 0 else []))
