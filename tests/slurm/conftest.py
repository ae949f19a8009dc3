"""A Slurm cluster of three machines for the session, where one can be started; elsewhere its tests are skipped by name."""

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.slurm.cluster import start, why_not


@pytest.fixture(scope="session")
def cluster():
    if (reason := why_not()) is not None:
        pytest.skip(f"no Slurm here: {reason}")
    directory = Path(
        tempfile.mkdtemp(prefix="r1mega-slurm-")
    )  # a short path: munge's socket has 108 characters at most
    directory.chmod(0o755)
    with start(directory, num_nodes=3) as running:
        yield running
    shutil.rmtree(directory)
