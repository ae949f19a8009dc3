"""Imports Transformer Engine's Python files with torch.cuda rewritten for a CPU. The files stay as they are."""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any

import torch

from r1mega.platform.cuda_stand_in import CudaStandIn
from r1mega.platform.megatron_import import rewrite_for_cpu
from tests.te.stand_in import extension, permutation

PACKAGE = "transformer_engine"
WITHOUT_FILES = {f"{PACKAGE}.pytorch.triton.permutation": permutation}
ABSENT = (f"{PACKAGE}.pytorch.triton.", f"{PACKAGE}.pytorch.onnx_extensions")  # triton and onnxscript, both large
_WHILE_IMPORTING = {
    "NVTE_PROJECT_BUILDING": "1",  # do not load CUDA's libraries
    "NVTE_TORCH_COMPILE": "0",  # compiling costs seconds a shape and a C++ compiler on a CPU
}


class Hopper(CudaStandIn):
    """torch.cuda of an H100 as Transformer Engine's Python part asks for it; work is done on the CPU all the same."""

    class nvtx:  # noqa: N801
        range_push = staticmethod(lambda *_args: None)
        range_pop = staticmethod(lambda *_args: None)

    default_generators = defaultdict(lambda: torch.default_generator)
    """By device: the random state is the CPU's (recomputed activations)."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def get_device_properties(_device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="stand-in", total_memory=80 << 30)

    @staticmethod
    def get_device_capability(_device: Any = None) -> tuple[int, int]:
        return 9, 0

    @staticmethod
    def is_current_stream_capturing() -> bool:
        return False


def rewrite(source: str) -> str:
    """A file of Transformer Engine for tensors on a CPU: what r1mega does to megatron-core, and the names of devices."""
    source = source.replace('torch.device("cuda", torch.cuda.current_device())', 'torch.device("cpu")')
    source = source.replace("torch.version.cuda", '"13.0"')
    source = source.replace(
        "from torch.cuda import _lazy_call, _lazy_init",
        "_lazy_call, _lazy_init = (lambda call: call()), (lambda: None)",
    )
    source = rewrite_for_cpu(source)
    source = re.sub(r"(['\"])cuda\1", '"cpu"', source)
    return re.sub(r"\bis_cuda\b", "is_cpu", source)


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        """See importlib."""
        with open(self.path, encoding="utf-8") as file:
            return compile(rewrite(file.read()), self.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["_cuda_stand_in"] = Hopper()
        super().exec_module(module)
        if module.__name__ == f"{PACKAGE}.common":
            module.load_framework_extension = lambda _framework: None  # the compiled module is there already


class _Given(importlib.abc.Loader):
    """For modules that are made, not read."""

    def __init__(self, module: ModuleType):
        self._module = module

    def create_module(self, spec: Any) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        pass


class Finder(importlib.abc.MetaPathFinder):
    """Finds transformer_engine in its folder, and nowhere else."""

    def __init__(self, directory: Path):
        self.directory = directory

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None):
        """See importlib. None for everything but Transformer Engine's modules."""
        if fullname == extension.NAME:
            return importlib.util.spec_from_loader(
                fullname, _Given(extension.make(self.directory / PACKAGE / "pytorch"))
            )
        if fullname.partition(".")[0] != PACKAGE:
            return None
        if fullname in WITHOUT_FILES:
            made = ModuleType(fullname)
            made.__dict__.update({n: v for n, v in vars(WITHOUT_FILES[fullname]).items() if not n.startswith("__")})
            return importlib.util.spec_from_loader(fullname, _Given(made))
        if fullname.startswith(ABSENT):
            return importlib.util.spec_from_loader(fullname, _Given(extension.AbsentModule(fullname)))
        spec = importlib.machinery.PathFinder.find_spec(fullname, path or [str(self.directory)])
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(fullname, spec.loader.path)
        return spec


def load(directory: Path) -> ModuleType:
    """Import Transformer Engine from `directory`, for the rest of this process. Raises what its files raise."""
    if PACKAGE in sys.modules:
        return sys.modules[PACKAGE]
    before = {name: os.environ.get(name) for name in _WHILE_IMPORTING}
    os.environ.update(_WHILE_IMPORTING)
    sys.meta_path.insert(0, Finder(directory))
    sys.path.append(str(directory))  # its version is read from the metadata beside it
    try:
        importlib.import_module(f"{PACKAGE}.pytorch")  # the package itself would hide an error of it
        return sys.modules[PACKAGE]
    finally:
        sys.path.remove(str(directory))
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


_loaded: dict[str, ModuleType] = {}


@contextlib.contextmanager
def loaded(directory: Path) -> Iterator[ModuleType]:
    """Transformer Engine for a while, in a process that is to have none: its modules are taken out again.

    They are kept for the next time, because torch registers their operators once.
    """
    sys.modules.update(_loaded)
    try:
        yield load(directory)
    finally:
        for name in [n for n in sys.modules if n.partition(".")[0] in (PACKAGE, extension.NAME)]:
            _loaded[name] = sys.modules.pop(name)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, Finder)]
