"""The matrix-product peak of a device, from its maker's data sheets: dense, without structured sparsity."""

from __future__ import annotations

_PEAKS = (  # name contains, bfloat16 TFLOP/s, FP8 TFLOP/s (None: the device has no FP8); the first that matches counts
    ("H100 PCIe", 756.0, 1513.0),
    ("H100 NVL", 835.5, 1671.0),
    ("H200 NVL", 835.5, 1671.0),
    ("H800 PCIe", 756.0, 1513.0),
    ("GH200", 989.4, 1978.9),
    ("H100", 989.4, 1978.9),  # SXM: "NVIDIA H100 80GB HBM3"
    ("H200", 989.4, 1978.9),
    ("H800", 989.4, 1978.9),
    ("GB200", 2500.0, 5000.0),
    ("B200", 2250.0, 4500.0),
    ("A100", 312.0, None),
    ("A800", 312.0, None),
)


def peak_tflops(device_name: str, dtype: str, fp8: bool = False) -> float | None:
    """TFLOP/s of one device in the type that a run's matrix products have; None where that is not known.

    device_name: as torch.cuda.get_device_name tells. dtype: model.dtype; for float32 none is given, because it depends
    on whether TensorFloat-32 is allowed. fp8: judge by the FP8 peak, although FP8 recipes leave some products in bfloat16.
    """
    if dtype != "bfloat16":
        return None
    for name, bfloat16, eight in _PEAKS:
        if name.lower() in device_name.lower():
            return eight if fp8 else bfloat16
    return None
