"""DeepSeek-V3's published form: weights in FP8 e4m3 with one float32 scale per 128 x 128 block, `NAME_scale_inv`.

Source: DeepSeek-V3 technical report, section 3.3.2, and the config.json of the published checkpoint.
weight = fp8 * scale_inv, block by block.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from r1mega.config.model_files import HFConfig
from r1mega.config.precision import BLOCK
from r1mega.errors import CheckpointError

SCALE = "_scale_inv"
MAX = torch.finfo(torch.float8_e4m3fn).max  # 448
CONFIG = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
_STRIP_ELEMENTS = 1 << 22
_QUANTIZED = re.compile(r"model\.layers\.\d+\.(self_attn\.\w+_proj\w*|mlp\..*(gate|up|down)_proj)\.weight")


def is_quantized(name: str) -> bool:
    """Whether the published form holds this tensor in FP8: the linear layers, but not router, embeddings or head."""
    return bool(_QUANTIZED.fullmatch(name))


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of a matrix [rows, columns]: one a block, also for the incomplete ones at the edges."""
    return tuple(-(-size // BLOCK) for size in shape)


def check_config(hf_config: HFConfig) -> bool:
    """Whether config.json says that weights are in this form. CheckpointError for every other quantization."""
    quantization = hf_config.get("quantization_config")
    if not quantization:
        return False
    if not isinstance(quantization, Mapping):
        raise CheckpointError(f"config.json: quantization_config = {quantization!r} is no section of keys")
    for key in ("quant_method", "fmt", "weight_block_size"):
        if quantization.get(key) != CONFIG[key]:
            raise CheckpointError(
                f"config.json: quantization_config.{key} = {quantization.get(key)!r} cannot be read, only"
                f" {CONFIG[key]!r}"
            )
    return True


def dequantize(weight: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """[rows, columns] FP8 and [ceil(rows/128), ceil(columns/128)] -> `out` [rows, columns], of any float dtype.

    Products are float32, rounded once. 128 rows at a time, so that beside the result only a strip is held.
    """
    columns = weight.shape[1]
    for i, scale in enumerate(scales.float()):
        rows = slice(i * BLOCK, (i + 1) * BLOCK)
        out[rows] = weight[rows].float() * scale.repeat_interleave(BLOCK)[:columns]
    return out


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, columns] -> (FP8 e4m3, float32 scales [ceil(rows/128), ceil(columns/128)]).

    scale = largest absolute value of the block / 448; a block of zeros has scale 1. Several rows of blocks at a time, so that
    beside the result only a strip is held.
    """
    rows, columns = weight.shape
    quantized = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scales = torch.empty(scale_shape(tuple(weight.shape)), dtype=torch.float32, device=weight.device)
    step = max(1, _STRIP_ELEMENTS // (BLOCK * max(columns, 1))) * BLOCK
    for start in range(0, rows, step):
        strip = weight[start : start + step].float()
        padding = (0, -columns % BLOCK, 0, -len(strip) % BLOCK)
        blocks = torch.nn.functional.pad(strip, padding).view(-(-len(strip) // BLOCK), BLOCK, -1, BLOCK)
        largest = blocks.abs().amax(dim=(1, 3))
        scale = torch.where(largest > 0, largest / MAX, 1.0)
        scales[start // BLOCK : start // BLOCK + len(scale)] = scale
        scaled = (blocks / scale[:, None, :, None]).clamp(-MAX, MAX).to(torch.float8_e4m3fn)
        quantized[start : start + step] = scaled.view(-1, columns + padding[1])[: len(strip), :columns]
    return quantized, scales
