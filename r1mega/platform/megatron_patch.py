"""A change to the source of a module of megatron-core."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from packaging.version import Version


@dataclass(frozen=True, slots=True)
class Patch:
    """Replace `old` by `new` in the source of megatron.core.`module`, `count` times exactly.

    upstream: the change that ends it: a pull request of NVIDIA/Megatron-LM, or, where none is known, what it would have to do.
    since, fixed_in: the first version that needs it and the first that no longer does; None: the oldest that is supported,
    none yet. fault: another text of the module, there as long as what is patched is, where `old` alone would outlive it.
    """

    module: str
    when: Literal["cpu", "no_te", "always"]
    old: str
    new: str
    reason: str
    upstream: str = ""
    count: int = 1
    since: str | None = None
    fixed_in: str | None = None
    fault: str = ""

    def is_for(self, version: str) -> bool:
        """Whether this version of megatron-core needs the patch."""
        return (self.since is None or Version(version) >= Version(self.since)) and not self.ended(version)

    def ended(self, version: str) -> bool:
        """Whether megatron-core has done by this version what the patch does."""
        return self.fixed_in is not None and Version(version) >= Version(self.fixed_in)

    @property
    def versions(self) -> str:
        """Of megatron-core that need it, such as '>=0.19'; empty: all."""
        bounds = [(">=", self.since), ("<", self.fixed_in)]
        return ",".join(f"{sign}{bound}" for sign, bound in bounds if bound is not None)
