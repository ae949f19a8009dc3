"""YAML in and out, with the numbers of `scalars`."""

from __future__ import annotations

import re
from collections.abc import Mapping

import yaml

from r1mega.config.scalars import FLOAT, INTEGER

_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_OWN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp")}


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Of plain scalars by their first character. A date stays the text that was written."""
    kept = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _OWN_TAGS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for name, pattern in (("int", INTEGER), ("float", FLOAT), ("float", _NOT_FINITE)):
        whole = re.compile(rf"(?:{pattern.pattern})\Z")
        for first in "-+.0123456789":
            kept.setdefault(first, []).append((f"tag:yaml.org,2002:{name}", whole))
    return kept


class Loader(yaml.SafeLoader):
    """YAML with the numbers of this module."""

    yaml_implicit_resolvers = _resolvers()


class Dumper(yaml.SafeDumper):
    """Quotes a text that either YAML 1.1 or this module would take for something else."""

    yaml_implicit_resolvers = {
        first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *Loader.yaml_implicit_resolvers.get(first, [])]
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *Loader.yaml_implicit_resolvers}
    }


def load_yaml(text: str) -> object:
    """The value of a text of YAML. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=Loader)


def dump_yaml(values: Mapping[str, object]) -> str:
    """YAML that `load_yaml` and any other reader of YAML read back to the same."""
    return yaml.dump(dict(values), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
