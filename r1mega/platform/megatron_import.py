"""How megatron-core is imported here: its source is changed on the way, as `megatron_patches` says, and on a CPU its uses of CUDA.

Changes are made to the source text as each module is imported, so that torch stays as it is, whatever is imported
before or after (vLLM replaces parts of torch.cuda itself).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import marshal
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, Literal

from r1mega.errors import PlatformError
from r1mega.noise import silence
from r1mega.platform.cuda_stand_in import CudaStandIn
from r1mega.platform.megatron_patches import MEGATRON_VERSIONS, Patch, installed_version, needed_patches

_logger = logging.getLogger(__name__)

_CUDA_TYPE_NAME = re.compile(r"(['\"])torch\.cuda\.(\w+Tensor)")
_CUDA_MODULE = re.compile(r"(?<!from )(?<!import )\btorch\.cuda\.(?=\w)")
_CUDA_METHOD = re.compile(r"\.cuda\([^()]*(?:\(\))?\)")
_CUDA_DEVICE = re.compile(r"\b(device|map_location)=(['\"])cuda\2")
_CUDA_DEVICE_CALL = re.compile(r"\btorch\.device\((['\"])cuda\1\)")
_CUDA_STREAM_USE = re.compile(r"\.record_stream\([^()]*(?:\(\))?\)")
_PINNED = re.compile(r"\bpin_memory=True\b")
_EXPECTED_REWRITES = ("pipeline_parallel.schedules", "optimizer.clip_grads", "optimizer.optimizer")


def rewrite_for_cpu(source: str) -> str:
    """Turn every use of CUDA in a megatron-core module into its CPU form. Lines keep their numbers.

    'torch.cuda.FloatTensor' (a name) -> 'torch.FloatTensor'; torch.cuda.x -> the stand-in; t.cuda() -> t.cpu();
    device='cuda', map_location='cuda', torch.device('cuda') -> the same with 'cpu'; t.record_stream(s) -> t.cpu();
    pin_memory=True -> pin_memory=False. Tensors never move, because all are on the CPU already.
    """
    source = _CUDA_TYPE_NAME.sub(r"\1torch.\2", source)
    source = _CUDA_MODULE.sub("_cuda_stand_in.", source)
    source = _CUDA_METHOD.sub(".cpu()", source)
    source = _CUDA_STREAM_USE.sub(".cpu()", source)
    source = _PINNED.sub("pin_memory=False", source)
    source = _CUDA_DEVICE_CALL.sub("torch.device('cpu')", source)
    return _CUDA_DEVICE.sub(r"\1='cpu'", source)


def apply_patches(module: str, source: str, patches: Sequence[Patch]) -> str:
    """`patches` applied to the source of megatron.core.`module`. Raises PlatformError when one does not fit."""
    for patch in patches:
        found = source.count(patch.old)
        if found != patch.count:
            raise PlatformError(
                f"megatron.core.{module}: {patch.old!r} is there {found} times instead of {patch.count} "
                f"({patch.reason}). r1mega was made for megatron-core {' and '.join(MEGATRON_VERSIONS)}: install one of "
                "these, unchanged, or review r1mega/platform/megatron_patches.py"
            )
        source = source.replace(patch.old, patch.new)
    return source


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles the changed source, once: what came of it is kept beside Python's own bytecode, with a digest of all that it came from.
    Unchanged modules take Python's own way.
    """

    def __init__(self, fullname: str, path: str, patches: Sequence[Patch], cpu: bool, names: dict[str, Any]):
        super().__init__(fullname, path)
        self._patches, self._cpu, self._names = patches, cpu, names

    def get_code(self, fullname: str) -> CodeType | None:
        """See importlib. Raises PlatformError where a patch finds no longer what it replaces."""
        original = self.get_data(self.path)
        kept = importlib.util.cache_from_source(self.path, optimization="r1megacpu" if self._cpu else "r1mega")
        how = (_rules(), self._patches, self._cpu, self.path, importlib.util.MAGIC_NUMBER, sys.flags.optimize)
        came_from = repr(how).encode() + original
        if (code := _read_code(kept, came_from)) is None:
            code = self._changed(fullname, original.decode())
            if not sys.dont_write_bytecode:
                content = marshal.dumps(code)
                content = _digest(came_from) + _digest(content) + content
                self._cache_bytecode(self.path, kept, content)  # type: ignore[attr-defined]  # with the rights of the source
        return code or super().get_code(fullname)

    def _changed(self, fullname: str, original: str) -> CodeType | Literal[""]:
        """Nothing where nothing was to change."""
        module = fullname.removeprefix("megatron.core.")
        source = apply_patches(module, original, self._patches)
        if self._cpu:
            source = rewrite_for_cpu(source)
            if module in _EXPECTED_REWRITES and source == original:
                raise PlatformError(f"{fullname}: no use of CUDA found to rewrite; megatron-core has changed")
        return compile(source, self.path, "exec", dont_inherit=True) if source != original else ""

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__.update(self._names)
        super().exec_module(module)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


@functools.cache
def _rules() -> bytes:
    """What a source is changed by, beside the patches: a digest of this file."""
    return _digest(Path(__file__).read_bytes())


def _read_code(path: str, came_from: bytes) -> CodeType | Literal[""] | None:
    """None where there is none, none of that, or none that is whole."""
    try:
        content = Path(path).read_bytes()
    except OSError:
        return None
    source, whole, content = content[:32], content[32:64], content[64:]
    return marshal.loads(content) if source == _digest(came_from) and whole == _digest(content) else None


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, patches: Sequence[Patch], cpu: bool):
        self.cpu = cpu
        self.by_module: dict[str, list[Patch]] = {}
        for patch in patches:
            self.by_module.setdefault(patch.module, []).append(patch)
        self.names: dict[str, Any] = {}
        if cpu:
            self.names = {
                "_cuda_stand_in": CudaStandIn(),
                "_uneven_all_gather": _uneven_all_gather,
                "_uneven_reduce_scatter": _uneven_reduce_scatter,
            }

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None):
        """See importlib. None for every module but those of megatron.core that are to be changed."""
        if not fullname.startswith("megatron.core."):
            return None
        patches = self.by_module.get(fullname.removeprefix("megatron.core."), ())
        if not patches and not self.cpu:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            return spec
        spec.loader = _Loader(fullname, spec.loader.path, patches, self.cpu, self.names)
        return spec


def is_installed() -> bool:
    """Whether imports of megatron.core take the patches."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def install(platform: Any) -> None:
    """Make later imports of megatron.core take the patches for this platform. Idempotent.

    Raises PlatformError when megatron.core is imported already (unpatched) or is of a version that is not supported.
    """
    if is_installed():
        return
    loaded = sorted(name for name in sys.modules if name.startswith("megatron.core"))
    if loaded:
        raise PlatformError(f"{loaded[0]} was imported before r1mega.platform.prepare(): call it first")
    version = installed_version()
    _hide_unused(platform)
    silence()
    sys.meta_path.insert(0, _Finder(needed_patches(platform, version), cpu=platform.name == "cpu"))


def _hide_unused(platform: Any) -> None:
    """Megatron-core takes Transformer Engine and apex wherever it can import them: without a GPU too, and of versions and builds
    that this platform refuses; one whose import fails with another error than ImportError ends the process.
    """
    for name, is_used in (("transformer_engine", platform.has_transformer_engine), ("apex", platform.has_apex)):
        if is_used or importlib.util.find_spec(name) is None:
            continue
        _logger.warning("%s is installed and not used: megatron-core does without it (r1mega doctor says why)", name)
        for module in [name, *(loaded for loaded in sys.modules if loaded.startswith(f"{name}."))]:
            sys.modules[module] = None  # type: ignore[assignment]  # its import is then a ModuleNotFoundError


def _uneven_all_gather(outputs: list[Any], tensor: Any, group: Any) -> None:
    """all_gather into tensors of different first dimensions: padded to the largest on the way."""
    import torch.distributed as dist

    padded = tensor.new_zeros((max(o.shape[0] for o in outputs), *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    gathered = [padded.new_empty(padded.shape) for _ in outputs]
    dist.all_gather(gathered, padded, group=group)
    for output, whole in zip(outputs, gathered, strict=True):
        output.copy_(whole[: output.shape[0]])


def _uneven_reduce_scatter(output: Any, inputs: list[Any], group: Any) -> None:
    """reduce_scatter of tensors of different first dimensions: all are summed everywhere, one is kept."""
    import torch
    import torch.distributed as dist

    total = torch.cat(inputs)
    dist.all_reduce(total, group=group)
    output.copy_(torch.split(total, [i.shape[0] for i in inputs])[group.rank()])
