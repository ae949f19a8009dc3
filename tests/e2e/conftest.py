"""A small base model, made once a session by the real base stage."""

import pytest

from tests.e2e.runs import r1mega


@pytest.fixture(scope="session")
def nano_base(tmp_path_factory):
    """Run directory of a base model after a few steps: it knows the form a little, its answers are mostly wrong."""
    run_dir = tmp_path_factory.mktemp("base") / "run"
    r1mega(
        "train", "configs/nano/base.yaml", f"run_dir={run_dir}", "steps=60", "threads=1", "optimizer.decay_steps=20",
        "task.num_train_prompts=64", "task.num_eval_prompts=16",
    )  # fmt: skip
    return run_dir
