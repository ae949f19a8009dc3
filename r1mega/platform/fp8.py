"""Which FP8 recipes this device has, as Transformer Engine says."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

RECIPES = ("blockwise", "tensorwise")


def recipe_problem(recipe: str) -> str | None:
    """Why this device cannot compute with a recipe, and what to set instead; None when it can.

    Transformer Engine is there. What the device does in its own way is a warning.
    """
    from transformer_engine.pytorch import is_fp8_available, is_fp8_block_scaling_available
    from transformer_engine.pytorch.utils import get_device_compute_capability

    checks = {"tensorwise": is_fp8_available, "blockwise": is_fp8_block_scaling_available}
    can, reason = checks[recipe](return_reason=True)
    major, minor = get_device_compute_capability()
    if not can:
        others = [f"model.fp8={other}" for other in RECIPES if other != recipe and checks[other]()]
        instead = " or ".join([*others, "model.fp8=off"])
        return f"model.fp8 = {recipe}: {reason} This one has compute capability {major}.{minor}; set {instead}"
    if recipe == "blockwise" and major >= 10:
        logger.warning(
            "model.fp8 = blockwise: from compute capability 10 on, Transformer Engine computes it as MXFP8 with the same scales"
        )
    return None
