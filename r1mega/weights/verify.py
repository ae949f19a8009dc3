"""The proof of a weight transfer: equal digests, then equal log-probs on fixed tokens.

The digest shows that the generator's parameters hold the bits that the trainer sent: it finds a missing, swapped,
permuted or altered tensor and a generator that was not updated. It cannot see what both sides share: tensors exported
wrongly, or packed wrongly for the kernels after they were read back. The probe can: it compares what the two models
compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from r1mega.errors import WeightSyncError
from r1mega.types import GenerationRequest, Response, SamplingSettings

PROBE_TOLERANCES = {torch.float32: 2e-4, torch.bfloat16: 0.6}
"""Largest |difference| of one log-prob. bfloat16: one expert chosen differently moves a token by about 0.5."""
_MAX_NAMED = 20


class Probed(Protocol):
    """What the probe needs of a generator (`rollout.engine.GenerationEngine` has it)."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[tuple[Response, ...]]: ...
    def prompt_log_probs(self, sequences: Sequence[Sequence[int]]) -> list[tuple[float, ...]]: ...


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """max_difference: |generator - trainer| over all probed tokens; decode_difference: the generator's decoding path
    against its own prompt path (0 when it was not compared)."""

    max_difference: float
    decode_difference: float


def compare_digests(trainer: Mapping[str, int], generator: Mapping[str, int]) -> None:
    """Raises WeightSyncError naming every tensor that one side lacks or whose bits differ."""
    problems = [f"{name}: the trainer did not send it" for name in generator if name not in trainer]
    problems += [f"{name}: the generator does not hold it" for name in trainer if name not in generator]
    problems += [f"{name}: digest {generator[name]:016x} in the generator, {digest:016x} in the trainer"
                 for name, digest in trainer.items() if name in generator and generator[name] != digest]
    if problems:
        raise WeightSyncError(f"the generator does not hold the trainer's weights; {len(problems)} of "
                              f"{len(set(trainer) | set(generator))} tensors differ:\n  " + _shortened(problems))


def probe(engine: Probed, sequences: Sequence[Sequence[int]], trainer_log_probs: Sequence[Sequence[float]],
          tolerance: float, decode_tokens: int = 4) -> ProbeResult:
    """Compares the generator's log-probs of fixed tokens with the trainer's (temperature 1, len - 1 values each).

    Prompts run through other kernels and other derived weights than decoding does (MLA absorbs kv_b_proj when it
    decodes); so each sequence's last `decode_tokens` are also decoded greedily and compared with the same tokens as a
    prompt. decode_tokens=0 leaves that out. Raises WeightSyncError naming the worst positions.
    """
    problems: list[tuple[float, str]] = []
    worst = 0.0
    found = engine.prompt_log_probs(sequences)
    for index, (ours, theirs) in enumerate(zip(trainer_log_probs, found, strict=True)):
        worst = max(worst, _differences(ours, theirs, tolerance, f"sequence {index}", 1, "trainer", problems))
    decode_worst = 0.0
    if decode_tokens:
        prompts = [tuple(sequence[:max(1, len(sequence) - decode_tokens)]) for sequence in sequences]
        sampling = SamplingSettings(temperature=0.0, max_tokens=decode_tokens)
        responses = [samples[0] for samples in engine.generate(
            [GenerationRequest(prompt, 1, 0, sampling) for prompt in prompts])]
        again = engine.prompt_log_probs([(*prompt, *response.token_ids)
                                         for prompt, response in zip(prompts, responses, strict=True)])
        for index, (prompt, response, values) in enumerate(zip(prompts, responses, again, strict=True)):
            decode_worst = max(decode_worst, _differences(
                values[len(prompt) - 1:], response.log_probs, tolerance, f"sequence {index} decoded", len(prompt),
                "its own prompt path", problems))
    if problems:
        problems.sort(key=lambda problem: -problem[0])
        raise WeightSyncError(f"the generator does not compute what the trainer computes: {len(problems)} log-probs "
                              f"differ by more than {tolerance:g}, worst first:\n  "
                              + _shortened([text for _, text in problems]))
    return ProbeResult(worst, decode_worst)


def _differences(reference: Sequence[float], found: Sequence[float], tolerance: float, where: str, offset: int,
                 source: str, problems: list[tuple[float, str]]) -> float:
    """Largest difference; values beyond the tolerance (NaN is) are added to `problems`."""
    if len(reference) != len(found):
        raise WeightSyncError(f"{where}: {len(found)} log-probs from the generator, {len(reference)} from {source}")
    worst = 0.0
    for position, (a, b) in enumerate(zip(reference, found, strict=True)):
        difference = abs(a - b)
        if not difference <= tolerance:
            order = difference if difference == difference else float("inf")
            text = f"{where}, token {position + offset}: {b:.6f} in the generator, {a:.6f} by {source}"
            problems.append((order, text))
        worst = max(worst, difference)
    return worst


def _shortened(lines: list[str]) -> str:
    rest = len(lines) - _MAX_NAMED
    return "\n  ".join(lines[:_MAX_NAMED] + ([f"... and {rest} more"] if rest > 0 else []))
