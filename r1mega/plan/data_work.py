"""Hours of processors that a stage spends on its data before it trains: the work that rank 0 deals out to all (docs/data.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SECONDS = {"tokenise": 5.7, "filters": 6.7, "hash": 1.8, "decontaminate": 0.6}
"""Of one processor for a million tokens: `python tools/bench_data_work.py --samples 96 --words 2000`, on one rank."""
ALONE = 0.23
"""Of rank 0's, for a million tokens: handing out, taking in and the index of the hashes, all four works together; on four ranks."""


@dataclass(frozen=True, slots=True)
class DataWork:
    """tokens: of all samples; ranks: that share the work, a thread each."""

    works: Sequence[str]
    tokens: float
    ranks: int

    @property
    def hours(self) -> float:
        """Of each rank."""
        return sum(SECONDS[work] for work in self.works) * self.tokens / 1e6 / self.ranks / 3600

    @property
    def hours_alone(self) -> float:
        """Of rank 0, beside its share: this part does not fall with the ranks."""
        return ALONE * self.tokens / 1e6 / 3600

    def line(self, name: str) -> str:
        """Of the report on node `name`."""
        return (
            f"data        of {name}: {', '.join(self.works)} of {self.tokens / 1e9:,.2f} G tokens, {self.hours:,.2f} h of each of "
            f"{self.ranks:,} ranks' processors and {self.hours_alone:,.2f} h of rank 0's alone"
        )
