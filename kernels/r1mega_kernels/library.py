"""Declares the operators, loads the compiled libraries, and says which implementation serves a device."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import zlib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from r1mega_kernels import reference

_log = logging.getLogger(__name__)
_HERE = Path(__file__).parent

LIBRARY = torch.library.Library("r1mega_kernels", "DEF")


class PlatformError(RuntimeError):
    """A compiled library that a call needs is not built, or does not load into this torch."""


# What the compiled libraries implement. Results go to tensors that the caller allocates; an optional tensor that is not
# given is one without elements. The order of arguments is that of kernels/csrc/*/..._ops.
_SCHEMAS = (
    "instruction_set(int request) -> int",
    # without entropy the statistics lack its terms (NaN); a CPU refuses targets outside [0, vocab_size), bad rows and lists
    "log_prob_stats(Tensor logits, Tensor targets, Tensor inverse_temperature, Tensor rows, bool has_rows, "
    "int vocab_start, int vocab_size, bool entropy, Tensor(a!) stats) -> ()",
    "log_prob_merge(Tensor shards, Tensor inverse_temperature, Tensor rows, bool has_rows, Tensor(a!) stats, "
    "Tensor(b!) results) -> ()",
    # of float32 logits on a GPU the gradient may be of 16 bits, also in the beginning of the logits' own rows
    "log_prob_backward(Tensor logits, Tensor targets, Tensor inverse_temperature, Tensor positions, "
    "bool has_positions, int vocab_start, Tensor stats, Tensor entropy, Tensor grads, Tensor(a!) grad_logits) -> ()",
    # of lists of kept ids: kept_ranges [T, 2] says where a token's list begins and ends, an empty one keeps every id
    "kept_log_prob_stats(Tensor logits, Tensor targets, Tensor inverse_temperature, Tensor rows, bool has_rows, "
    "int vocab_start, int vocab_size, bool entropy, Tensor(a!) stats, Tensor kept_ids, Tensor kept_ranges) -> ()",
    "kept_log_prob_backward(Tensor logits, Tensor targets, Tensor inverse_temperature, Tensor positions, "
    "bool has_positions, int vocab_start, Tensor stats, Tensor entropy, Tensor grads, Tensor(a!) grad_logits, "
    "Tensor kept_ids, Tensor kept_ranges, Tensor(b!) scratch) -> ()",
    "group_advantage(Tensor rewards, Tensor offsets, Tensor mask, int baseline, int scale, float epsilon, "
    "Tensor(a!) advantages) -> ()",
    "grpo_token_loss(Tensor log_probs, Tensor old, Tensor reference, Tensor sampler, Tensor advantages, "
    "Tensor weights, Tensor mask, Tensor sequence_ids, bool weights_per_sequence, float clip_low, float clip_high, "
    "float dual_clip, float kl_coefficient, float importance_cap, int surrogate, float sapo_positive, "
    "float sapo_negative, bool kl_bias_correction, Tensor(a!) grad, Tensor(b!) sums) -> ()",
)
NATIVE = SimpleNamespace()
"""The operators by name, found once: a look-up by torch.ops costs each call of them a tenth more."""
for _schema in _SCHEMAS:
    LIBRARY.define(_schema)
    _name = _schema.split("(")[0]
    setattr(NATIVE, _name, getattr(torch.ops.r1mega_kernels, _name).default)
    if _name != "instruction_set":
        torch.library.register_fake(f"r1mega_kernels::{_name}", lambda *args: None, lib=LIBRARY)


def _load(name: str) -> bool:
    """Whether the compiled library was found and loaded. A library that is there and does not load is an error."""
    path = _HERE / name
    if not path.exists():
        return False
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise PlatformError(
            f"{path} does not load into torch {torch.__version__} (2.10 or newer is needed): {error}. "
            "Build it again with `python kernels/build.py`, or delete it to use the torch reference."
        ) from error
    signature = getattr(ctypes.CDLL(str(path)), "r1mega_kernels_signature", int)
    if signature() & 0xFFFFFFFF != zlib.crc32(repr(_SCHEMAS).encode()):
        raise PlatformError(
            f"{path} was built for other operators than this version's, and would read their arguments wrongly: build it "
            "again with `python kernels/build.py`, or delete it to use the torch reference."
        )
    return True


_DISABLED = os.environ.get("R1MEGA_KERNELS", "") == "reference"


def _has_cpu() -> bool:
    """Raises PlatformError for a library that is there and of no use: at the first call, not at the import of a program that
    may say so better (`r1mega doctor`), or that asks for the reference."""
    if _CPU_PROBLEM is not None:
        raise PlatformError(_CPU_PROBLEM)
    return _CPU_LOADED


_CPU_LOADED, _CPU_PROBLEM = False, None
try:
    _CPU_LOADED = not _DISABLED and _load("_cpu.so")
except PlatformError as _error:
    _CPU_PROBLEM = str(_error)


def _has_cuda() -> bool:
    return _loaded_cuda()


@functools.cache
def _loaded_cuda() -> bool:
    """Looked for at the first call that asks, not at import: a process that forks later must not have met the driver."""
    return not _DISABLED and torch.cuda.is_available() and _load("_cuda.so")


# torch.compiler.assume_constant_result, which is this, imports the compiler: more than the rest of the package takes
for _answer in (_has_cpu, _has_cuda):
    _answer._dynamo_marked_constant = True  # type: ignore[attr-defined]


def instruction_set() -> str:
    """'generic' (128-bit vectors), 'avx2' or 'avx512': what the CPU library chose on this machine.

    Raises:
        PlatformError: the CPU library is not built.
    """
    if not _has_cpu():
        raise PlatformError("the CPU kernel library is not built: run `python kernels/build.py` (needs g++)")
    return ("generic", "avx2", "avx512")[torch.ops.r1mega_kernels.instruction_set(-1)]


def backend(device: torch.device | str | None = None) -> str:
    """Which implementation serves tensors of `device` (default: a GPU if torch has one, else the CPU).

    'cuda', 'cpu-avx512', 'cpu-avx2', 'cpu-generic', or 'reference' (torch functions: the library is not built, or
    R1MEGA_KERNELS=reference). On a GPU without the CUDA library the answer is 'missing': calls there raise
    PlatformError unless they ask for backend='reference'.

    Raises:
        PlatformError: a library is there that does not load, or was built for another version's operators.
    """
    kind = torch.device(device).type if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cpu":
        return f"cpu-{instruction_set()}" if _has_cpu() else "reference"
    if kind == "cuda" and _has_cuda():
        return "cuda"
    return "reference" if _DISABLED else "missing"


@functools.cache
def _say_once(message: str) -> None:
    _log.warning(message)


def uses_reference(x: torch.Tensor, requested: str | None) -> bool:
    """Whether a call on the device of `x` runs the torch reference: asked for by name, or the CPU library is not built (logged).

    Raises:
        ValueError: `requested` is neither None, 'native' nor 'reference'.
        PlatformError: the native kernels are asked for, or the device is a GPU, and the library is not built; or it is of no
            use (see `backend`).
    """
    if requested is not None and requested not in ("native", "reference"):
        raise ValueError(f"backend must be None, 'native' or 'reference', not {requested!r}")
    if requested == "reference" or _DISABLED:
        return True
    if _has_cpu() if x.is_cpu else x.is_meta or (x.is_cuda and _has_cuda()):
        return False
    if requested == "native" or not x.is_cpu:
        raise PlatformError(
            f"no compiled kernels for device {x.device}: run `python kernels/build.py` (needs "
            f"{'g++' if x.is_cpu else 'nvcc'}), or ask for backend='reference'"
        )
    _say_once("r1mega_kernels: the CPU library is not built (no g++ at install time?); using the torch reference")
    return True


def check_devices(device: torch.device, **tensors: torch.Tensor | None) -> None:
    """Raises ValueError for a tensor on another device: a kernel would follow its address."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, expected {device}")


def plain(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` as a kernel reads it: contiguous, of `dtype`, without a gradient's history; itself where it is that already."""
    if x.requires_grad:
        x = x.detach()
    if x.dtype != dtype:  # the first is the shortest call, by the name half a microsecond shorter
        x = x.double() if dtype == torch.float64 else x.to(dtype=dtype)
    return x if x.is_contiguous() else x.contiguous()


def looks_at_values(x: torch.Tensor) -> bool:
    """Whether arguments are checked by their values: on a GPU that would stall the stream, and torch.compile cannot branch
    on them."""
    return x.is_cpu and not torch.compiler.is_compiling()


def is_plain_cpu(x: torch.Tensor) -> bool:
    """Whether constants that were made once may stand beside `x`: not beside a fake tensor or another subclass."""
    kind = type(x)
    return (kind is torch.Tensor or kind is torch.nn.Parameter) and looks_at_values(x)


@functools.cache
def _nothing(dtype: torch.dtype) -> torch.Tensor:
    with torch.inference_mode(False):  # whatever mode or default device is on at the first call
        return torch.empty(0, dtype=dtype, device="cpu")


def nothing(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[0], where `like` is: stands for a tensor that is not given."""
    return _nothing(dtype) if is_plain_cpu(like) else like.new_empty(0, dtype=dtype)


def kernels(use_reference: bool) -> SimpleNamespace | ModuleType:
    """The low-level operators, or the torch functions of the same signatures."""
    return reference if use_reference else NATIVE
