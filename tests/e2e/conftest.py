"""What several files of tests share: a small base model, made once a session by the real base stage, and the pipeline that makes one."""

import shutil
import signal
import time

import pytest

from tests.e2e.runs import PIPELINE, SMALL, base_arguments, lineage, metrics, r1mega
from tests.processes import start


@pytest.fixture(scope="session")
def nano_base(request, tmp_path_factory):
    """Run directory of a base model after a few steps: it knows the form a little, its answers are mostly wrong. Where the pipeline's
    tests run too, a copy of its first stage's: the same start.
    """
    run_dir = tmp_path_factory.mktemp("base") / "run"
    if any(item.path.name == "test_pipeline.py" for item in request.session.items):
        shutil.copytree(request.getfixturevalue("small_pipeline")[0] / "base", run_dir)
    else:
        r1mega(*base_arguments(run_dir), real=True)
    return run_dir


@pytest.fixture(scope="session")
def small_pipeline(tmp_path_factory):
    """(directory, arguments, exit code of the first start, output of the second): stopped in zero's first steps, then
    started again."""
    directory = tmp_path_factory.mktemp("pipeline") / "runs"
    file = directory.parent / "r1.yaml"
    file.write_text(PIPELINE)
    arguments = ["pipeline", file, f"dir={directory}", *SMALL]
    with open(directory.parent / "log", "w") as log:
        first = start(*arguments, output=log, real=True)
    limit = time.monotonic() + 900
    while not metrics(directory / "zero") and first.poll() is None and time.monotonic() < limit:
        time.sleep(0.05)
    running = lineage(directory, "zero")["state"]
    first.send_signal(signal.SIGTERM)
    code = first.wait(300)
    stopped = lineage(directory, "zero")["state"]
    second = r1mega(*arguments)
    return directory, arguments, (running, code, stopped), second.stdout
