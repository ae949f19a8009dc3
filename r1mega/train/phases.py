"""Memory phases as a plan: what of the trainer and of the generator is where while a step goes on. Pure data.

`train.memory` moves the trainer's parts by it, `stages.phases` the generator's with them. docs/gpu.md has the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from r1mega.config.schema import MemoryConfig

Phase = Literal["rollout", "score", "evaluate", "logprob", "reference", "update", "step", "reshard", "save"]
"""score: by reward models on the device; reference: log-probs of the reference weights; update: forward and backward
passes; step: the optimizer's, within the update; save: of a checkpoint. In a step: rollout, score, logprob, reference,
update and step in turn, reshard."""
Part = Literal[
    "weights", "gradients", "main_params", "exp_avg", "exp_avg_sq", "reference", "generator_weights", "kv_cache"
]
"""main_params: the optimizer's float32 copies (none of float32 weights, which it updates where they are)."""
Place = Literal["device", "host", "dropped"]
"""host: a copy in (pinned) host memory, nothing on the device; dropped: nowhere, made anew when it comes back."""

HOST_BLOCK = 2**28
"""Bytes of one piece of the host memory that weights and optimizer state go to."""

PHASES: tuple[Phase, ...] = get_args(Phase)
PARTS: tuple[Part, ...] = get_args(Part)
_GENERATES = ("rollout", "evaluate")
_AWAKE = ("rollout", "score", "evaluate")


def pinned_bytes(num_bytes: int) -> int:
    """What torch takes of host memory for a pinned tensor: the next power of two (its CachingHostAllocator)."""
    return 1 << (num_bytes - 1).bit_length() if num_bytes > 0 else 0


@dataclass(frozen=True, slots=True)
class PhasePlan:
    """places: of every part in every phase. kept: parts whose room in host memory stays theirs in all phases."""

    places: Mapping[Phase, Mapping[Part, Place]]
    kept: frozenset[Part]

    def device_bytes(self, phase: Phase, sizes: Mapping[Part, float]) -> float:
        """Of what this rank holds on its device. sizes: of each part on this rank; without a part: 0."""
        return sum(sizes.get(part, 0) for part, place in self.places[phase].items() if place == "device")

    def host_bytes(self, phase: Phase, sizes: Mapping[Part, float]) -> float:
        """The same of host memory, of one rank."""
        places = self.places[phase]
        return sum(sizes.get(part, 0) for part in PARTS if part in self.kept or places[part] == "host")

    def __str__(self) -> str:
        """A table, one phase a line."""
        lines: list[list[str]] = [["phase", *PARTS]]
        lines += [[phase, *(self.places[phase][part] for part in PARTS)] for phase in PHASES]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def plan_phases(memory: MemoryConfig, *, sleep: bool = True, cpu_adam: bool = False, scores: bool = False) -> PhasePlan:
    """The plan of a stage with these keys. sleep: rollout.sleep; without it the generator stays where it is. cpu_adam:
    optimizer.cpu_offload. scores: whether reward models score on the device.
    """
    places = {phase: _places(phase, memory, sleep, cpu_adam) for phase in PHASES}
    kept: set[Part] = {"reference"}
    if memory.param_offload or memory.reference_swap:
        kept.add("weights")
    if memory.optimizer_offload != "none":
        kept |= {"main_params", "exp_avg", "exp_avg_sq"}
    if scores and sleep:
        kept.add("generator_weights")  # vLLM keeps the room of what it once put there
    return PhasePlan(places, frozenset(kept))


def _places(phase: Phase, memory: MemoryConfig, sleep: bool, cpu_adam: bool) -> dict[Part, Place]:
    weights_away = (memory.param_offload and phase in _AWAKE) or (memory.reference_swap and phase == "reference")
    needs_state = ("step", "save") if memory.optimizer_offload == "update" else ("update", "step", "save")
    leaves = memory.optimizer_offload != "none" and phase not in needs_state
    state: Place = "host" if leaves or cpu_adam else "device"
    generator: Place = "device"
    if sleep and phase not in (*_GENERATES, "reshard"):
        generator = "host" if phase == "score" else "dropped"
    return {
        "weights": "host" if weights_away else "device",
        "gradients": "dropped" if memory.grad_offload and phase not in ("update", "step") else "device",
        "main_params": state,
        "exp_avg": state,
        "exp_avg_sq": state,
        "reference": "device" if phase == "reference" else "host",
        "generator_weights": generator,
        "kv_cache": "dropped" if sleep and phase not in _GENERATES else "device",
    }
