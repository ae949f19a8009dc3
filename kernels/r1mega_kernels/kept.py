"""Lists of the ids that a sampler kept of each token's vocabulary (top-p, top-k), over which log-probs are renormalised."""

from __future__ import annotations

from typing import NamedTuple

import torch

from r1mega_kernels.library import check_devices


class KeptTokens(NamedTuple):
    """ids: [M] int32, the lists one after the other, each strictly increasing ids in the whole vocabulary. offsets: [T + 1]
    int64 from 0 to M, never falling: token t keeps ids[offsets[t]:offsets[t + 1]]. A token with an empty list keeps the
    whole vocabulary (a prompt's, or one that was sampled without truncation). A token's target is in its list.
    """

    ids: torch.Tensor
    offsets: torch.Tensor

    def ranges(self) -> torch.Tensor:
        """[T, 2] int64: where each token's list begins and ends, as the kernels take it; rows of it may be picked. Within
        [0, M] and never falling whatever the offsets are: on a GPU nobody has looked at them."""
        offsets = self.offsets.clamp(0, self.ids.shape[0])
        return torch.stack([offsets[:-1], torch.maximum(offsets[:-1], offsets[1:])], 1)


def gradient_scratch(ids: torch.Tensor | None) -> torch.Tensor | None:
    """[M] float32 of lists of kept ids, where a backward pass puts kept gradients while it clears a row."""
    return None if ids is None else torch.empty(ids.shape, dtype=torch.float32, device=ids.device)


def check_ends(kept: KeptTokens) -> None:
    """Raises ValueError where the lists do not begin and end with the ids; reads two offsets."""
    ids, offsets = kept
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(ids):
        raise ValueError(f"kept.offsets must rise from 0 to {len(ids)}, not {offsets.tolist()[:8]}...")


def check_kept(kept: KeptTokens, targets: torch.Tensor, rows: torch.Tensor | None, size: int, by_value: bool) -> None:
    """Raises ValueError or TypeError for lists that the kernels would read wrongly; by_value: reads them (a synchronisation
    on a GPU, where a target outside its list gives NaN)."""
    ids, offsets = kept
    if ids.dim() != 1 or offsets.dim() != 1 or len(offsets) != len(targets) + 1:
        raise ValueError(
            f"expected kept.ids [M] and kept.offsets [{len(targets) + 1}], not {list(ids.shape)} and {list(offsets.shape)}"
        )
    check_devices(targets.device, **{"kept.ids": ids, "kept.offsets": offsets})
    if ids.dtype != torch.int32 or offsets.dtype != torch.int64:
        raise TypeError(f"kept.ids must be int32 and kept.offsets int64, not {ids.dtype} and {offsets.dtype}")
    if not by_value:
        return
    check_ends(kept)
    lengths = offsets.diff()
    if bool((lengths < 0).any()):
        raise ValueError(f"kept.offsets must rise from 0 to {len(ids)}, not {offsets.tolist()[:8]}...")
    if not len(ids):
        return
    rising = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    rising[1:] = ids[1:] > ids[:-1]
    rising[offsets[:-1][lengths > 0]] = True  # a list may begin anywhere
    low, high = (int(v) for v in ids.aminmax())
    if not bool(rising.all()) or low < 0 or high >= size:
        raise ValueError(f"each list of kept.ids must be strictly increasing ids in [0, {size})")
    owner = torch.repeat_interleave(lengths)
    lacking = lengths > 0
    lacking[owner[ids == targets[owner]]] = False
    wrong = (lacking if rows is None else lacking[rows]).nonzero()
    if len(wrong):
        token = int(wrong[0]) if rows is None else int(rows[wrong[0]])
        raise ValueError(f"the target of token {token}, {int(targets[token])}, is not among the ids that it keeps")
