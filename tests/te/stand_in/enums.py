"""Types of the compiled module, and its answers about the machine. Values as in transformer_engine.h of 2.20.2."""

from __future__ import annotations

import enum
from typing import Any

import torch


class DType(enum.IntEnum):
    """Numbers of the types of elements."""

    kByte = 0
    kInt32 = 1
    kFloat32 = 2
    kFloat16 = 3
    kBFloat16 = 4
    kFloat8E4M3 = 5
    kFloat8E5M2 = 6
    kFloat4E2M1 = 7


TORCH_DTYPES = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
    DType.kFloat8E4M3: torch.float8_e4m3fn,
    DType.kFloat8E5M2: torch.float8_e5m2,
}

FP8FwdTensors = enum.IntEnum(
    "FP8FwdTensors", [f"GEMM{i}_{role}" for i in (1, 2, 3) for role in ("INPUT", "WEIGHT", "OUTPUT")], start=0
)
FP8BwdTensors = enum.IntEnum(
    "FP8BwdTensors", [f"GRAD_{role}{i}" for i in (1, 2, 3) for role in ("OUTPUT", "INPUT")], start=0
)


def _numbered(name: str, *members: str) -> type[enum.IntEnum]:
    return enum.IntEnum(name, [f"NVTE_{member}" for member in members], start=0)


# what an attention is described by
NVTE_QKV_Format = _numbered(
    "NVTE_QKV_Format",
    "SBHD",
    "BSHD",
    "THD",
    "BSHD_2SBHD",
    "SBHD_2BSHD",
    "THD_2BSHD",
    "THD_2SBHD",
    "BHSD",
    "QKV_Format_NOT_SET",
)
NVTE_QKV_Layout = _numbered(
    "NVTE_QKV_Layout",
    *("SB3HD", "SBH3D", "SBHD_SB2HD", "SBHD_SBH2D", "SBHD_SBHD_SBHD", "BS3HD", "BSH3D", "BSHD_BS2HD", "BSHD_BSH2D"),
    *("BSHD_BSHD_BSHD", "T3HD", "TH3D", "THD_T2HD", "THD_TH2D", "THD_THD_THD", "SBHD_BSHD_BSHD", "BSHD_SBHD_SBHD"),
    *("THD_BSHD_BSHD", "THD_SBHD_SBHD", "Paged_KV_BSHD_BSHD_BSHD", "Paged_KV_BSHD_SBHD_SBHD"),
    *("Paged_KV_SBHD_BSHD_BSHD", "Paged_KV_SBHD_SBHD_SBHD", "Paged_KV_THD_BSHD_BSHD", "Paged_KV_THD_SBHD_SBHD"),
    *("BHSD_BHSD_BHSD", "QKV_Layout_NOT_SET"),
)
NVTE_Bias_Type = _numbered("NVTE_Bias_Type", "NO_BIAS", "PRE_SCALE_BIAS", "POST_SCALE_BIAS", "ALIBI")
NVTE_Mask_Type = _numbered(
    "NVTE_Mask_Type",
    *("NO_MASK", "PADDING_MASK", "CAUSAL_MASK", "PADDING_CAUSAL_MASK", "CAUSAL_BOTTOM_RIGHT_MASK"),
    "PADDING_CAUSAL_BOTTOM_RIGHT_MASK",
)
NVTE_Softmax_Type = _numbered("NVTE_Softmax_Type", "VANILLA_SOFTMAX", "OFF_BY_ONE_SOFTMAX", "LEARNABLE_SOFTMAX")

# how the fused router, which has no stand-in, keeps its map
NVTERoutingMapFormat = enum.IntEnum("NVTERoutingMapFormat", ["BYTEMAP", "BITMAP_U8"], start=0)
NVTEQBHistogramMode = enum.IntEnum("NVTEQBHistogramMode", ["TWO_KERNEL", "FUSED_ATOMIC"], start=0)


class NVTE_Fused_Attn_Backend(enum.IntEnum):  # noqa: N801 (its name there)
    """Which of cuDNN's attention kernels serves a call."""

    NVTE_No_Backend = -1
    NVTE_F16_arbitrary_seqlen = 1
    NVTE_FP8 = 2


def get_fused_attn_backend(*_args: Any, **_kwargs: Any) -> tuple[NVTE_Fused_Attn_Backend, str]:
    """There is no cuDNN: Transformer Engine then takes its unfused attention."""
    return NVTE_Fused_Attn_Backend.NVTE_No_Backend, "no cuDNN on a CPU"


def get_cudnn_version() -> int:
    """cuDNN 9.20, which the layers ask for before they choose an attention."""
    return 92000


def get_cublasLt_version() -> int:  # noqa: N802 (its name there)
    """cuBLAS 13.1."""
    return 130100


def get_num_cublas_streams() -> int:
    """One workspace each is allocated for."""
    return 4
