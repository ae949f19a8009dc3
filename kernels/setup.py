"""The kernels alone: `pip install ./kernels` builds what the compilers here can, and needs nothing of r1mega."""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))

from build import build_libraries  # noqa: E402


class WithLibraries(build_py):
    """Compiles the libraries into the package first."""

    def run(self):
        build_libraries()
        super().run()


class PlatformWheel(bdist_wheel):
    """Libraries of this platform, for every Python: they use torch's stable ABI."""

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    name="r1mega-kernels",
    version="0.1.0",
    description="Log-probs, GRPO losses and group advantages for policy updates: CUDA and CPU kernels for torch",
    long_description=(Path(__file__).parent / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=["r1mega_kernels"],
    package_data={"r1mega_kernels": ["*.so", "py.typed"]},
    install_requires=["torch>=2.10"],
    cmdclass={"build_py": WithLibraries, "bdist_wheel": PlatformWheel},
)
