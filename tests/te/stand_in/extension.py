"""`transformer_engine_torch`, put together; what has no stand-in raises by its name."""

from __future__ import annotations

import importlib.machinery
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.te.stand_in import enums, gemm, multi_tensor, norms, quantize, rows, softmax

NAME = "transformer_engine_torch"
OPERATIONS = (
    enums.get_fused_attn_backend,
    enums.get_cudnn_version,
    enums.get_cublasLt_version,
    enums.get_num_cublas_streams,
    gemm.generic_gemm,
    gemm.te_general_grouped_gemm,
    norms.rmsnorm_fwd,
    norms.rmsnorm_bwd,
    quantize.create_empty_quantized_tensor,
    quantize.quantize,
    quantize.split_quantize,
    quantize.bgrad_quantize,
    quantize.fp8_transpose,
    rows.fused_multi_row_padding,
    rows.fused_multi_row_unpadding,
    rows.convert_thd_to_bshd,
    rows.convert_bshd_to_thd,
    softmax.scaled_softmax_forward,
    softmax.scaled_softmax_backward,
    softmax.scaled_masked_softmax_forward,
    softmax.scaled_masked_softmax_backward,
    multi_tensor.multi_tensor_adam,
    multi_tensor.multi_tensor_l2norm,
    multi_tensor.multi_tensor_scale,
    multi_tensor.multi_tensor_scale_tensor,
)
TYPES = (
    enums.DType,
    enums.FP8FwdTensors,
    enums.FP8BwdTensors,
    enums.NVTE_QKV_Format,
    enums.NVTE_QKV_Layout,
    enums.NVTE_Bias_Type,
    enums.NVTE_Mask_Type,
    enums.NVTE_Softmax_Type,
    enums.NVTE_Fused_Attn_Backend,
    enums.NVTERoutingMapFormat,
    enums.NVTEQBHistogramMode,
)
_IMPORT = re.compile(rf"^from {NAME} import (\([^)]*\)|[^(\n]*)", re.MULTILINE)
_USE = re.compile(r"\btex\.([A-Za-z]\w*)")


class Absent:
    """A name that has no stand-in: it can be imported, put in a table or an annotation, but not be called."""

    def __init__(self, name: str):
        self._name = name

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        raise NotImplementedError(f"{self._name} has no stand-in on a CPU (tests/te/stand_in)")

    def __getattr__(self, name: str) -> Absent:
        if name.startswith("_"):
            raise AttributeError(name)
        return Absent(f"{self._name}.{name}")

    def __or__(self, _other: Any) -> Any:  # X | None in an annotation
        return object

    __ror__ = __or__

    def __repr__(self) -> str:
        return f"<{self._name}: no stand-in>"


class AbsentModule(ModuleType):
    """A module whose every further name is Absent."""

    def __getattr__(self, name: str) -> Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}")


def make(sources: Path) -> ModuleType:
    """The module. sources: the folder of the Python files, whose uses of it tell what else it has."""
    module = ModuleType(NAME, __doc__)
    module.__spec__ = importlib.machinery.ModuleSpec(NAME, None)
    for file in sources.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        imported = re.findall(r"\w+", " ".join(_IMPORT.findall(text)))
        for name in (*_USE.findall(text), *imported):
            setattr(module, name, Absent(f"{NAME}.{name}"))
    for thing in (*OPERATIONS, *TYPES):
        setattr(module, thing.__name__, thing)
    return module
