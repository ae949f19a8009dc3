"""What a config names as `module:attribute`: code of the user's own."""

from __future__ import annotations

import importlib
from typing import Any

from r1mega.errors import ConfigError


def load_named(name: str, where: str) -> Any:
    """The attribute of the module. where: begins the message, as in "stage is 'mine:Stage'". ConfigError when it cannot be had."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{where}: {error}; install its package into this Python, or put its folder on PYTHONPATH"
        ) from error
    except Exception as error:  # whatever the module raises: it is not ours
        raise ConfigError(f"{where}: cannot be loaded: {type(error).__name__}: {error}") from error
