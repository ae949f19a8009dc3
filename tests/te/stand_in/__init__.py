"""Transformer Engine's own Python layers on a CPU, over torch in place of its compiled module.

Transformer Engine 2.20.2 is a wheel of Python files (modules, quantizers, autograd functions, recipes) over one compiled module,
`transformer_engine_torch`. Here the files are the wheel's, unchanged on disk; `torch.cuda` in them is rewritten as they
are imported, as r1mega does with megatron-core's; and the compiled module is plain torch:

    enums.py        the types of the module, and what it says of its machine (a Hopper GPU)
    gemm.py         matrix products, single and grouped, of plain and of quantized tensors
    norms.py        RMSNorm
    quantize.py     FP8: one scale a tensor, or one for each 1x128 or 128x128 block; really rounded to 8 bits
    rows.py         padding for grouped products; packed sequences to rectangles and back
    softmax.py      of attention scores
    multi_tensor.py Adam, norms, scaling of many tensors
    permutation.py  what Triton kernels do in Transformer Engine: tokens to experts and back

`test_operations.py` compares each with a float64 brute force. Everything else raises NotImplementedError by its name when it
is called.

Not covered: the numerics and speed of the kernels (products are added up in float32, in torch's order); cuDNN and flash
attention (Transformer Engine's own unfused attention runs); context parallelism of its attention, which needs them;
NCCL (gloo carries its collectives); communication overlapped with products (user buffers); CUDA graphs; its own offloading;
MXFP8, NVFP4 and delayed scaling; biases and activations fused into products; LayerNorm; fused rotary embeddings,
router and cross entropy; the files `onnx_extensions.py` and `triton/*.py` of its Python part.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

VERSION = "2.20.2"
DIRECTORY_VARIABLE = "R1MEGA_TRANSFORMER_ENGINE"


def directory() -> Path:
    """The folder that holds `transformer_engine/`: where launch/test.sh puts it, or what R1MEGA_TRANSFORMER_ENGINE names.

    It is no part of site-packages: the other tests are of a machine without it.
    """
    return Path(os.environ.get(DIRECTORY_VARIABLE) or Path(sys.prefix) / "transformer_engine")


def why_missing() -> str:
    """Why Transformer Engine's files cannot be used; empty when they can."""
    where = directory()
    if not (where / f"transformer_engine-{VERSION}.dist-info").is_dir():
        return (
            f"Transformer Engine {VERSION} is not in {where}: pip install --no-deps --target {where} "
            f"-r requirements/te.lock, or name its folder by {DIRECTORY_VARIABLE}"
        )
    return ""


def install() -> None:
    """Make this process one that has Transformer Engine, on a CPU. Before the first import of megatron; for ranks of tests.

    Raises ModuleNotFoundError when its files are not there, PlatformError after `platform.prepare()`.
    """
    import torch

    from r1mega import platform
    from tests.te.stand_in import importer

    if missing := why_missing():
        raise ModuleNotFoundError(missing)
    platform.use(
        platform.Platform(
            name="cpu",
            device=torch.device("cpu"),
            distributed_backend="gloo",
            has_transformer_engine=True,
            has_apex=False,
        )
    )
    importer.load(directory())
