"""The reward for programs, in a sandbox."""

from __future__ import annotations

import shutil

import pytest

from r1mega.reward.code import CodeReward
from r1mega.sandbox import Launcher, Limits, LocalBackend


@pytest.fixture(scope="module")
def reward():
    if shutil.which("bwrap") is None:
        pytest.skip("bwrap missing: apt-get install -y bubblewrap util-linux")
    return CodeReward(LocalBackend(Launcher(), probe=False), Limits(wall_seconds=30.0))
