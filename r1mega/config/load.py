"""YAML file + includes + `a.b=c` overrides -> a checked, frozen stage config. No heavy imports: this runs first."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from r1mega.config.schema import Stage
from r1mega.config.stages import stage_model
from r1mega.config.yaml_text import Loader, dump_yaml, load_yaml
from r1mega.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)
Places = dict[tuple[str, ...], str]
"""Where each key was set: ("rollout", "top_p") -> "zero.yaml:12" or "command line"."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> Stage:
    """Read, merge and check a config. Paths inside are relative to the current directory, includes to their file.

    Raises ConfigError naming file:line and key for what is missing, unknown (with the nearest known key) or of the wrong
    type. Checks that need the model's config or the number of processes: `validate.validate`.
    """
    places: Places = {}
    merged = _load(path, overrides, places)
    try:
        model = stage_model(merged.get("stage"))
    except ConfigError as error:
        raise ConfigError(f"{places.get(('stage',), str(path))}: {error}") from error
    return _checked(merged, model, places, path)


def load_as(model: type[Model], path: Path, overrides: Sequence[str] = ()) -> Model:
    """A YAML file that is not a stage (a pipeline), read, merged and checked in the same way, as `model`."""
    places: Places = {}
    return _checked(_load(path, overrides, places), model, places, path)


def dump_config(config: Stage) -> str:
    """The whole resolved config as YAML; loading it gives the same config."""
    return dump_yaml(config.model_dump(mode="json"))


def with_defaults(values: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """A stored config (JSON types), perhaps of an older program, with the defaults of keys that it lacks.

    A key that came later stands for what programs before it did. Nothing is checked: unknown keys remain, required ones that
    are missing stay so.
    """
    filled = {
        name: _filled(value, model.model_fields[name].annotation) if name in model.model_fields else value
        for name, value in values.items()
    }
    for name, field in model.model_fields.items():
        if name not in filled and not field.is_required():
            filled[name] = to_jsonable_python(field.get_default(call_default_factory=True))
    return filled


def _filled(value: Any, annotation: Any) -> Any:
    kinds = get_args(annotation)
    if get_origin(annotation) is dict and isinstance(value, Mapping):
        return {name: _filled(inner, kinds[1]) for name, inner in value.items()}
    if get_origin(annotation) is tuple and isinstance(value, (list, tuple)):
        return [_filled(inner, kinds[0]) for inner in value]
    section = next((k for k in (annotation, *kinds) if isinstance(k, type) and issubclass(k, BaseModel)), None)
    return with_defaults(value, section) if section is not None and isinstance(value, Mapping) else value


def unknown_keys(values: Mapping[str, Any], model: type[BaseModel], path: Path) -> list[tuple[str, Any, str]]:
    """(dotted key, its value, text that names file and nearest known key) of the keys in `path` that `model` does not have."""
    found = []
    for key in _unknown_keys(values, model, ()):
        value = functools.reduce(lambda inner, name: inner[name], key, values)
        found.append((".".join(key), value, _describe_unknown(key, model, {}, path)))
    return found


def _load(path: Path, overrides: Sequence[str], places: Places) -> dict[str, Any]:
    return _resolve(_merge(_read(Path(path), places, ()), _overrides(overrides, places)))


def _checked(values: Mapping[str, Any], model: type[Model], places: Places, path: Path) -> Model:
    unknown = list(_unknown_keys(values, model, ()))
    if unknown:
        raise ConfigError("\n".join(_describe_unknown(key, model, places, path) for key in unknown))
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(problem, places, path) for problem in error.errors())) from error


def _read(path: Path, places: Places, chain: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in [earlier.resolve() for earlier in chain]:
        raise ConfigError(f"{path}: includes itself ({' -> '.join(map(str, (*chain, path)))})")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{path}: cannot be read ({reason})") from error
    try:
        content = load_yaml(text)
        tree = yaml.compose(text, Loader=Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else f"{path}"
        raise ConfigError(f"{place}: not YAML ({getattr(error, 'problem', error)})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must be a mapping of keys to values")
    lines: dict[tuple[str, ...], int] = {}
    for key, line in _lines(tree, ()):
        if key in lines:
            raise ConfigError(
                f"{path}:{line}: {'.'.join(key)} was given at line {lines[key]} already; remove one of them"
            )
        lines[key] = line
    included = content.pop("include", [])
    included = [included] if isinstance(included, str) else included
    if not isinstance(included, list) or not all(isinstance(name, str) for name in included):
        raise ConfigError(f"{path}:{lines[('include',)]}: include must be a file name or a list of file names")
    result: dict[str, Any] = {}
    for name in included:
        result = _merge(result, _read(path.parent / _at_home(name), places, (*chain, path)))
    places.update({key: f"{path}:{line}" for key, line in lines.items()})
    return _merge(result, content)


def _lines(node: yaml.Node | None, prefix: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = (*prefix, str(key.value))
            yield name, key.start_mark.line + 1
            yield from _lines(value, name)


def _at_home(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"include: {name}: there is no such home directory") from error


def _overrides(overrides: Sequence[str], places: Places) -> dict[str, Any]:
    merged = OmegaConf.create()
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"command line: {item!r} is not of the form key.sub=value")
        places[tuple(key.split("."))] = "command line"
        try:
            OmegaConf.update(merged, key, load_yaml(text))
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            problem = " ".join(str(getattr(error, "problem", None) or error).split())
            raise ConfigError(
                f"command line: {item!r}: not YAML ({problem}); quote the value: {key}='\"...\"'"
            ) from error
    return _plain(merged)


def _merge(base: Mapping[str, object], over: Mapping[str, object]) -> dict[str, Any]:
    try:
        return _plain(OmegaConf.merge(OmegaConf.create(dict(base)), OmegaConf.create(dict(over))))
    except OmegaConfBaseException as error:
        raise ConfigError(f"config: {error}") from error


def _resolve(values: Mapping[str, object]) -> dict[str, Any]:
    """Put values in the place of `${a.b}`: last, so that overrides count."""
    try:
        return _plain(OmegaConf.create(dict(values)), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"config: {error}") from error


def _plain(config: object, resolve: bool = False) -> dict[str, Any]:
    """A config as dicts and lists. The keys of a mapping are texts: what else YAML allows, no section has."""
    values = OmegaConf.to_container(config, resolve=resolve)
    if not isinstance(values, dict):
        raise ConfigError(f"config: a mapping of keys to values is wanted, not {values!r:.60}")
    return {str(key): value for key, value in values.items()}


def _section(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The section model behind a field, if it is one. (A mapping of free names to sections is left to pydantic.)"""
    field = model.model_fields.get(name)
    if field is None or get_origin(field.annotation) is dict:
        return None
    kinds = (field.annotation, *get_args(field.annotation))
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)


def _unknown_keys(
    values: Mapping[str, Any], model: type[BaseModel], prefix: tuple[str, ...]
) -> Iterator[tuple[str, ...]]:
    for name, value in values.items():
        if name not in model.model_fields:
            yield (*prefix, str(name))
        elif (section := _section(model, name)) is not None and isinstance(value, Mapping):
            yield from _unknown_keys(value, section, (*prefix, name))


def _known_keys(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name in model.model_fields:
        yield (*prefix, name)
        if (section := _section(model, name)) is not None:
            yield from _known_keys(section, (*prefix, name))


def _describe_unknown(key: tuple[str, ...], model: type[BaseModel], places: Places, path: Path) -> str:
    known = list(_known_keys(model))
    siblings = [k[-1] for k in known if k[:-1] == key[:-1]]
    place = next((where for known, where in places.items() if known[: len(key)] == key), path)
    message = f"{place}: unknown key {'.'.join(key)}"
    elsewhere = [".".join(k) for k in known if k[-1] == key[-1]]
    if close := difflib.get_close_matches(key[-1], siblings, n=1, cutoff=0.6):
        return f"{message}; did you mean {'.'.join((*key[:-1], close[0]))}?"
    if elsewhere:
        return f"{message}; there is {' and '.join(elsewhere)}"
    if close := difflib.get_close_matches(".".join(key), [".".join(k) for k in known], n=1, cutoff=0.5):
        return f"{message}; did you mean {close[0]}?"
    return f"{message}; known here: {', '.join(siblings)}"


def _describe(problem: Mapping[str, Any], places: Places, path: Path) -> str:
    """One pydantic problem as `where: key: what`."""
    key = tuple(str(part) for part in problem["loc"])
    where = next((places[key[:n]] for n in range(len(key), 0, -1) if key[:n] in places), str(path))
    if problem["type"] == "missing":
        return f"{where}: {'.'.join(key)} is missing"
    if problem["type"] == "tuple_type":
        return f"{where}: {'.'.join(key)} = {problem['input']!r}: must be a list, as in [{problem['input']}]"
    return f"{where}: {'.'.join(key)} = {problem['input']!r}: {problem['msg'][0].lower() + problem['msg'][1:]}"
