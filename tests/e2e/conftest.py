"""A small base model, made once a session by the real base stage."""

import pytest

from tests.e2e.runs import base_arguments, r1mega


@pytest.fixture(scope="session")
def nano_base(tmp_path_factory):
    """Run directory of a base model after a few steps: it knows the form a little, its answers are mostly wrong."""
    run_dir = tmp_path_factory.mktemp("base") / "run"
    r1mega(*base_arguments(run_dir), real=True)
    return run_dir
