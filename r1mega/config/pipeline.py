"""A pipeline: stages in order, each a stage's config file and what differs here. The edges follow from the paths.

name: r1-nano
dir: runs/nano                 # of the pipeline's own records; dir=elsewhere takes the paths in it along
overrides: {seed: 1}           # for every node
nodes:
  base: {config: base.yaml}    # relative to this file
  zero: {config: zero.yaml, overrides: {steps: 60}, ranks: 2}
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from r1mega.config.load import load_as, load_config
from r1mega.config.schema import PositiveInt, Section, Stage
from r1mega.config.validate import promised, validate
from r1mega.errors import ConfigError


class NodeConfig(Section):
    """One stage of a pipeline: its config file, relative to the pipeline's, and what differs there."""

    config: Path
    overrides: dict[str, Any] = {}
    ranks: PositiveInt | None = None  # the pipeline's


class PipelineConfig(Section):
    """A pipeline file: nodes in the order in which they run, and overrides for all of them."""

    name: str
    dir: Path
    ranks: PositiveInt = 1
    # processes of a node that says nothing else; more than one: on this machine, or by the launcher that the command names
    ranks_per_machine: PositiveInt = 8
    overrides: dict[str, Any] = {}
    external: dict[str, Path | None] = {}
    # what is brought from elsewhere, and for a model a directory with its config.json: a dry run does not miss it
    nodes: dict[str, NodeConfig]


@dataclass(frozen=True, slots=True)
class Input:
    """A path that a node reads. key: where its config says so; owner: the node that makes it, None for a given one."""

    key: str
    path: Path
    owner: str | None


@dataclass(frozen=True, slots=True)
class Node:
    """A stage of a pipeline. source: the file its config came from."""

    name: str
    config: Stage
    source: Path
    ranks: int
    inputs: tuple[Input, ...]

    @property
    def parents(self) -> tuple[str, ...]:
        """The nodes that this one reads from, each once."""
        return tuple(dict.fromkeys(i.owner for i in self.inputs if i.owner is not None))


@dataclass(frozen=True, slots=True)
class Pipeline:
    """nodes: by name, each after the ones that it reads from."""

    name: str
    dir: Path
    source: Path
    ranks_per_machine: int
    external: Mapping[Path, Path | None]
    nodes: Mapping[str, Node]


NANO = Path("configs/nano")
"""The folder of the quickstart's configs, as the paths in them have it."""


def shipped_configs() -> Path:
    """Where `NANO` is: in the package where it was installed, beside it in a clone. ConfigError when it is nowhere."""
    package = Path(__file__).parents[1]
    found = next((base / NANO for base in (package, package.parent) if (base / NANO / "r1.yaml").exists()), None)
    if found is None:
        raise ConfigError(
            f"{package} came without {NANO}; install r1mega again, or run launch/quickstart.sh in a clone"
        )
    here = Path.cwd()
    return found.relative_to(here) if found.is_relative_to(here) else found


def load_pipeline(path: Path, overrides: Sequence[str] = (), moved: Mapping[Path, Path] | None = None) -> Pipeline:
    """Read a pipeline file and the configs it names. overrides: `dir=...`, `overrides.seed=2`, `zero.steps=3`. moved: folders
    that the configs name, and where they are instead.

    Raises ConfigError for what is wrong in any of the files, for two nodes with one run_dir, and for a node that reads
    what a later one makes.
    """
    path = Path(path)
    own = [item for item in overrides if item.partition("=")[0].split(".")[0] in PipelineConfig.model_fields]
    file, config = load_as(PipelineConfig, path), load_as(PipelineConfig, path, own)
    for_nodes = _by_node([item for item in overrides if item not in own], config)
    stages = {}
    for name, node in config.nodes.items():
        source = path.parent / node.config
        stage = load_config(source, [*_dotted(config.overrides), *_dotted(node.overrides), *for_nodes[name]])
        stages[name] = _moved(stage, {**(moved or {}), file.dir: config.dir})
    _check_run_dirs(stages)
    nodes = {
        name: Node(name, stages[name], path.parent / node.config, node.ranks or config.ranks, _inputs(name, stages))
        for name, node in config.nodes.items()
    }
    external = {_move(Path(name).expanduser(), file.dir, config.dir): model for name, model in config.external.items()}
    return Pipeline(config.name, config.dir, path, config.ranks_per_machine, external, nodes)


def check_pipeline(pipeline: Pipeline, names: Sequence[str], *, dry_run: bool, damaged: Collection[Path] = ()) -> None:
    """Raises ConfigError, naming nodes, for what cannot work in them. What an earlier node makes does not count as
    missing; in a dry run neither does what is brought from elsewhere. damaged: run directories whose content is not what
    their nodes made: it is not looked at.
    """
    problems = []
    for node in in_turn(pipeline, dry_run=dry_run, damaged=damaged):
        if node.name in names:
            try:
                validate(node.config, node.ranks)
            except ConfigError as error:
                problems += [f"{node.name} ({node.source}): {line}" for line in str(error).splitlines()]
    if problems:
        raise ConfigError("\n".join(problems))


def in_turn(pipeline: Pipeline, *, dry_run: bool, damaged: Collection[Path] = ()) -> Generator[Node, None, None]:
    """The nodes, and while each is looked at, what earlier ones make counts as there (`promised`). dry_run, damaged: as of
    `check_pipeline`.
    """
    promise: dict[Path, Path | None] = dict(pipeline.external) if dry_run else {}
    for node in pipeline.nodes.values():
        with promised(promise, damaged):
            yield node
        promise[node.config.run_dir] = node.config.model.path


def paths_of(value: Any, key: str = "") -> Iterator[tuple[str, Path]]:
    """(dotted key, path) of every path in a config, items of lists by their number."""
    if isinstance(value, Path):
        yield key, value
        return
    items: Any = ()
    if isinstance(value, BaseModel):
        items = ((name, getattr(value, name)) for name in type(value).model_fields)
    elif isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (tuple, list)):
        items = enumerate(value)
    for name, inner in items:
        yield from paths_of(inner, f"{key}.{name}" if key else str(name))


def is_inside(path: Path, directory: Path) -> bool:
    """Whether `path` is `directory` or below it; either may be relative, neither needs to exist."""
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(directory))


def _by_node(overrides: Sequence[str], config: PipelineConfig) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {name: [] for name in config.nodes}
    for item in overrides:
        head, _, rest = item.partition(".")
        if head not in found or not rest:
            known = [*config.nodes, *PipelineConfig.model_fields]
            close = difflib.get_close_matches(head.partition("=")[0], known, n=1, cutoff=0.6)
            names = ", ".join(config.nodes)
            hint = f"did you mean {close[0]}?" if close else f"an override names a node first: {names}"
            raise ConfigError(f"command line: {item!r}: {hint}")
        found[head].append(rest)
    return found


def _dotted(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """{"a": {"b": 1}, "c.d": "x: y"} -> ['a.b=1', 'c.d="x: y"']; quoted, a text stays one whatever it looks like."""
    lines = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            lines += _dotted(value, f"{prefix}{key}.")
        else:
            lines.append(f"{prefix}{key}={json.dumps(value, ensure_ascii=False)}")
    return lines


def _moved(stage: Stage, folders: Mapping[Path, Path]) -> Stage:
    """The config with every path inside a folder in the same place inside the one that it stands for."""
    for old, new in folders.items():
        if old != new:
            stage = type(stage).model_validate(_move(stage.model_dump(), old, new))
    return stage


def _move(value: Any, old: Path, new: Path) -> Any:
    if isinstance(value, Path):
        return new / os.path.relpath(value, old) if is_inside(value, old) else value
    if isinstance(value, Mapping):
        return {key: _move(inner, old, new) for key, inner in value.items()}
    return type(value)(_move(item, old, new) for item in value) if isinstance(value, (tuple, list)) else value


def _check_run_dirs(stages: Mapping[str, Stage]) -> None:
    names = list(stages)
    for place, name in enumerate(names):
        for other in names[:place]:
            a, b = stages[name].run_dir, stages[other].run_dir
            if is_inside(a, b) or is_inside(b, a):
                raise ConfigError(f"nodes {other} and {name}: run_dir {b} and {a} are not apart; give each its own")


def _inputs(name: str, stages: Mapping[str, Stage]) -> tuple[Input, ...]:
    earlier = list(stages)[: list(stages).index(name)]
    found = []
    for key, path in paths_of(stages[name]):
        if key == "run_dir":
            continue
        owner = next((other for other, stage in stages.items() if is_inside(path, stage.run_dir)), None)
        if owner is not None and owner not in earlier:
            made = "itself" if owner == name else f"{owner}, a later node; put {owner} before {name}"
            raise ConfigError(f"node {name}: {key} = {path} is made by {made}")
        found.append(Input(key, path, owner))
    return tuple(found)
