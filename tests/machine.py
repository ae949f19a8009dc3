"""What a machine may lack: what needs it is skipped by name."""

import os
import shutil
from pathlib import Path

import pytest

needs_bwrap = pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="bwrap missing: apt-get install -y bubblewrap util-linux"
)


def shared_data(name: str) -> Path:
    """A published file that the repository does not carry, in the folder that R1MEGA_SHARED_DATA names."""
    path = Path(os.environ.get("R1MEGA_SHARED_DATA", ""), name)
    if "R1MEGA_SHARED_DATA" not in os.environ or not path.is_file():
        pytest.skip(f"{name} is not here: name its folder in R1MEGA_SHARED_DATA")
    return path
