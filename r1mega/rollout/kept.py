"""Which ids a token was drawn from, read from the log-probs that vLLM reports after all of its cuts (`processed_logprobs`).

vLLM (0.32) tells kept ids itself (`return_sampling_mask`) with its newer model runner only, whose log-probs and seeds are held by no
test here; the likeliest ids' log-probs come from both runners, on any platform.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np

from r1mega.errors import GenerationError
from r1mega.types import KeptIds, SamplingSettings

TIES = 1024
"""Ids at least, beside those that a bound allows, for which there is room where they are as likely as the last of them."""
_CUT = np.float32(-np.inf)


def kept_width(sampling: SamplingSettings, vocab_size: int) -> int:
    """How many of the likeliest ids vLLM is to report of each token: room for all that are kept, and for `max_kept` (or TIES) that are
    as likely as the last of them; 0: kept ids are not asked for."""
    most = sampling.most_kept
    return 0 if sampling.max_kept is None or most is None else min(vocab_size, most + max(sampling.max_kept, TIES))


def check_kept(num_kept: int, sampling: SamplingSettings, vocab_size: int) -> None:
    """GenerationError where so many were kept of a token's vocabulary that `kept_width` of them need not be all."""
    width = kept_width(sampling, vocab_size)
    if num_kept < width or width == vocab_size:
        return
    binds = "max_kept_ids" if sampling.most_kept == sampling.max_kept else "top_k"
    raise GenerationError(
        f"at least {width} ids were kept of one token's vocabulary: so many are as likely as the last that rollout.{binds} = "
        f"{sampling.most_kept} allows, and the model does not tell them apart. Set rollout.max_kept_ids={min(2 * width, vocab_size)}, "
        f"which makes room for more (a run that goes on may); with {vocab_size}, the vocabulary, there is room for all"
    )


def kept_ids(ids: np.ndarray, log_probs: np.ndarray, sampling: SamplingSettings, vocab_size: int) -> np.ndarray:
    """Those of the likeliest ids, as vLLM reports them (likeliest first), that were not cut (-inf); increasing. GenerationError where
    there may be more."""
    num_kept = len(ids) - int(log_probs[::-1].searchsorted(_CUT, "right"))  # they fall, so few are looked at
    if num_kept > TIES:  # there is room for more than that, or for all
        check_kept(num_kept, sampling, vocab_size)
    return np.sort(ids[:num_kept])


@dataclass(slots=True)
class KeptLists:
    """Kept ids of a response in the making: 4 bytes an id and 4 a token."""

    counts: array[int] = field(default_factory=lambda: array("i"))
    ids: array[int] = field(default_factory=lambda: array("i"))

    def add(self, ids: np.ndarray) -> None:
        """Of the next token, increasing."""
        self.counts.append(len(ids))
        self.ids.frombytes(ids.astype(np.int32, copy=False).tobytes())

    def finished(self) -> KeptIds:
        """Of all tokens."""
        return KeptIds(np.array(self.counts, dtype=np.int32), np.array(self.ids, dtype=np.int32))
