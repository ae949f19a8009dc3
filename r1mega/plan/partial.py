"""Steps of partial rollouts, played through: how many responses run, how far they are, what a step leaves unfinished."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from r1mega.config.schema import PartialRollouts
from r1mega.rollout.open_groups import NEVER, find_cut

MOST_GROUPS = 64
"""Of a step; one that trains on more is played with so many, and all counts are that much larger."""
BIN = 64
"""Tokens of a response between two looks at how many run."""


@dataclass(frozen=True, slots=True)
class Played:
    """One step of all generators. running: (responses that run, the mean of what each has been given), of each BIN tokens;
    carried: tokens that unfinished responses bring along, whose cache is computed anew; left: those that stay unfinished, and
    of whole groups that wait.
    """

    running: tuple[tuple[float, float], ...]
    carried: float
    left: float


@functools.lru_cache(maxsize=8)
def played_steps(
    partial: PartialRollouts, responses: tuple[int, ...], num_prompts: int, group_size: int, seed: int
) -> tuple[Played, ...]:
    """Steps in their steady state: the first ones, which start with nothing, are left out.

    Each response has one of the lengths `responses` at random, whatever the others of its group have. Where a step ends is
    what a run asks, too (`rollout/open_groups.py`).
    """
    wanted = min(num_prompts, MOST_GROUPS)
    times, open_groups = num_prompts / wanted, partial.open_groups(wanted)
    numbers, finishes = np.random.default_rng(seed), partial.on_stale == "finish"
    lengths = np.empty((0, group_size), dtype=np.int64)
    done, born = lengths.copy(), np.empty(0, dtype=np.int64)
    warm_up, found = 4 * math.ceil(partial.overdraw), []
    for step in range(2 * warm_up):
        new = open_groups - len(born)
        lengths = np.vstack([lengths, numbers.choice(np.array(responses), (new, group_size))])
        done = np.vstack([done, np.zeros((new, group_size), dtype=np.int64)])
        born = np.append(born, np.full(new, step))
        rest, dues = lengths - done, born + partial.max_staleness
        clocks = rest.max(axis=1)
        deadlines = dues.tolist() if finishes else [NEVER] * len(born)
        cut = find_cut(clocks.tolist(), deadlines, NEVER, step, wanted, partial.every_tokens)
        assert cut is not None  # every group ends
        carried, running = float(done[rest > 0].sum()), _running(rest, done, cut)
        done = done + np.minimum(rest, cut)
        chosen = np.flatnonzero(clocks <= cut)[:wanted]
        kept = np.setdiff1d(np.flatnonzero(dues > step), chosen)
        lengths, done, born = lengths[kept], done[kept], born[kept]
        if step >= warm_up:
            found.append(Played(tuple((n * times, c) for n, c in running), carried * times, float(done.sum()) * times))
    return tuple(found)


def _running(rest: np.ndarray, done: np.ndarray, cut: int) -> list[tuple[float, float]]:
    """Of every BIN tokens up to `cut`: (responses that are not done, the mean of the tokens that each has)."""
    found = []
    for start in range(0, cut, BIN):
        runs = rest > start
        if not (count := int(runs.sum())):
            break
        found.append((float(count), float(done[runs].mean()) + start))
    return found
