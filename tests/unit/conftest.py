"""What `-m "not heavy"` leaves over is what a developer runs at each save (`launch/test.sh --fast`).

A file with `pytestmark = pytest.mark.heavy` is not even imported then. A test without the mark that is too heavy fails.
"""

import re
import resource
import sys

import pytest

CHOICE = "not heavy"
MARKED = re.compile(r"^pytestmark = .*\bmark\.heavy\b", re.M)
MOST_SECONDS = 10
"""Of a processor, imports of the first test among them."""


def seconds() -> float:
    """Processor time of this process and of those that it has waited for."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def pytest_ignore_collect(collection_path, config):
    is_test = collection_path.suffix == ".py" and config.option.markexpr == CHOICE
    return True if is_test and MARKED.search(collection_path.read_text()) else None


def pytest_collection_finish(session):
    if session.config.option.markexpr == CHOICE and "vllm" in sys.modules:
        raise pytest.UsageError("a file of tests/unit imports vLLM and is not marked heavy")


@pytest.fixture(autouse=True)
def not_heavy(request):
    """A test says that it is heavy, or isn't."""
    begun, loaded = seconds(), "vllm" in sys.modules
    yield
    if request.config.option.markexpr == CHOICE:
        assert loaded == ("vllm" in sys.modules), "this test imports vLLM: mark it heavy"
        assert seconds() - begun < MOST_SECONDS, f"{seconds() - begun:.0f} s of a processor: mark it heavy"
