"""Stage `rejection_sampling`: the data factory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from r1mega.config.data_factory import DataFactoryStage, GeneralConfig
from r1mega.config.validate import missing_file_problems


class RejectionSamplingStage(DataFactoryStage):
    """Many responses a prompt from the reasoner, the good ones kept, general data merged in (recipe: stage 3)."""

    outputs: ClassVar[tuple[str, ...]] = ("data/train.jsonl", "data/train.parquet", "data/card.json", "data/card.md")

    stage: Literal["rejection_sampling"]
    general: GeneralConfig = GeneralConfig()

    def problems(self, hf: dict[str, Any], world: int) -> Iterator[str]:
        yield from super().problems(hf, world)
        yield from missing_file_problems(("general.files", path) for path in self.general.files)
