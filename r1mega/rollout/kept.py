"""Which ids a token was drawn from, read from the log-probs that vLLM reports after all of its cuts (`processed_logprobs`).

vLLM (0.32) tells kept ids itself (`return_sampling_mask`) with its newer model runner only, whose log-probs and seeds are held by no
test here; the likeliest ids' log-probs come from both runners, on any platform.
"""

from __future__ import annotations

import numpy as np

from r1mega.errors import GenerationError
from r1mega.types import SamplingSettings


def kept_width(sampling: SamplingSettings, vocab_size: int) -> int:
    """How many of the likeliest ids vLLM is to report of each token: room for all that are kept and as many that are as likely as the
    last of them; 0: kept ids are not asked for."""
    return 0 if sampling.max_kept is None else min(vocab_size, 2 * (sampling.most_kept or vocab_size))


def kept_ids(ids: np.ndarray, log_probs: np.ndarray, vocab_size: int) -> np.ndarray:
    """Those of the likeliest ids, as vLLM reports them, that were not cut (-inf), in their order. GenerationError where there may be more."""
    finite = log_probs > -np.inf
    if finite.all() and len(finite) < vocab_size:
        raise GenerationError(
            f"more than {len(finite)} ids were kept of one token's vocabulary, since so many are as likely as the last that "
            "rollout.max_kept_ids (or top_k) allows: the model does not tell them apart. Raise rollout.max_kept_ids, or generate in float32"
        )
    return np.sort(ids[finite])
