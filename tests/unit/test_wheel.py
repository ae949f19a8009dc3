"""The package as pip installs it, away from the repository: `r1mega quickstart` finds the configs that it came with."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy  # pip builds a wheel, and a dry run imports torch
ROOT = Path(__file__).parents[2]
PARTS = (
    "r1mega",
    "kernels/r1mega_kernels",
    "configs/nano",
    "requirements",
)  # without kernels/build.py nothing is compiled


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package in it, of a wheel built from a copy of the source."""
    base = tmp_path_factory.mktemp("wheel")
    for part in PARTS:
        shutil.copytree(ROOT / part, base / "source" / part, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, base / "source" / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", base, base / "source"], check=True)
    (wheel,) = base.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", base / "site", wheel], check=True)
    return base / "site"


def run(installed, directory, *arguments):
    command = [sys.executable, "-m", "r1mega", *arguments]
    done = subprocess.run(
        command, cwd=directory, env=os.environ | {"PYTHONPATH": str(installed)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_plans_what_the_script_runs(installed, tmp_path):
    """Line for line but for the places: configs of the package, runs in the folder of the start; nothing is written."""
    assert "--stage" in run(installed, tmp_path, "quickstart", "--help")
    ours = run(installed, tmp_path, "quickstart", "--dry-run")
    repository = run(f"{ROOT}:{ROOT / 'kernels'}", ROOT, "quickstart", "--dry-run", "--dir", str(tmp_path / "none"))
    expected = repository.replace(str(tmp_path / "none"), "runs/nano").replace(
        "configs/nano", str(installed / "r1mega/configs/nano")
    )
    assert ours == expected and len(ours.splitlines()) > 30
    assert "(missing)" not in ours and list(tmp_path.iterdir()) == []


def test_every_config_is_in_the_wheel(installed):
    def files(root):
        return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    assert files(installed / "r1mega/configs/nano") == files(ROOT / "configs/nano")
