"""Transformer Engine's Python files, or tests skipped by name where they are missing."""

from pathlib import Path

import pytest

from tests.te import stand_in
from tests.te.stand_in import importer


def pytest_collection_modifyitems(items):
    reason = stand_in.why_missing()
    for item in items:
        if reason and item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def transformer_engine():
    """The package, in this process for a while: other tests of it shall not find it."""
    with importer.loaded(stand_in.directory()) as package:
        yield package


@pytest.fixture(scope="module")
def tex(transformer_engine):
    import transformer_engine_torch

    return transformer_engine_torch
