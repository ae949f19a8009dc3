"""Where a run stands in its prompts: an endless, seeded, resumable walk over shuffled epochs."""

from __future__ import annotations

import random
from typing import TypedDict


class CursorState(TypedDict):
    """What a cursor goes on from."""

    num_drawn: int
    num_items: int
    seed: int


class PromptCursor:
    """Draws item indices epoch by epoch, each epoch in its own seeded order. Its state is one counter."""

    def __init__(self, num_items: int, seed: int):
        if num_items < 1:
            raise ValueError("a cursor needs at least one item")
        self.num_items, self.seed, self.num_drawn = num_items, seed, 0
        self._epoch = -1
        self._order: list[int] = []

    def draw(self, count: int) -> list[int]:
        """The next `count` indices in [0, num_items)."""
        drawn = []
        for position in range(self.num_drawn, self.num_drawn + count):
            epoch, offset = divmod(position, self.num_items)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, list(range(self.num_items))
                random.Random(f"{self.seed}/{epoch}").shuffle(self._order)
            drawn.append(self._order[offset])
        self.num_drawn += count
        return drawn

    def state_dict(self) -> CursorState:
        return {"num_drawn": self.num_drawn, "num_items": self.num_items, "seed": self.seed}

    def load_state_dict(self, state: CursorState) -> None:
        """Raises ValueError when the state was saved over other data (another number of items or seed)."""
        if (state["num_items"], state["seed"]) != (self.num_items, self.seed):
            raise ValueError(
                f"the saved cursor walked over {state['num_items']} items with seed {state['seed']}, "
                f"this run has {self.num_items} items and seed {self.seed}"
            )
        self.num_drawn = state["num_drawn"]
