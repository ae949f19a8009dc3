"""`r1mega pipeline`: runs the stages of a pipeline in order, each in a process of its own, and records their lineage.

A finished node is skipped while its config and the contents of its inputs are the same; an interrupted one goes on; one
whose config or inputs have changed is refused, or with `redo` run anew after its old run_dir was moved aside. Nothing
is ever deleted.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from r1mega.config.load import dump_config
from r1mega.config.pipeline import Node, Pipeline, check_pipeline, in_turn, is_inside
from r1mega.config.schema import Stage, TrainingStage
from r1mega.errors import EXIT_SAVED_FOR_REQUEUE, ConfigError
from r1mega.files import write_atomic
from r1mega.observe.environment import PACKAGE, git_commit
from r1mega.observe.lineage import (
    LINEAGE_FILE,
    Attempt,
    ContentHashes,
    Lineage,
    Source,
    State,
    changed_outputs,
    fingerprint,
    now,
    read_lineage,
    stamp_outputs,
    write_lineage,
)
from r1mega.observe.pipeline_report import PIPELINE_FILE, read_ladder, write_pipeline_report
from r1mega.observe.progress import tell
from r1mega.observe.run import RunDirectory, config_changes, is_below, layout_keys
from r1mega.plan.command import generator_refusals
from r1mega.stages import is_finished

INCIDENTAL = ("run_dir", "threads", "timeouts", "watchdog", "restart", "observe", "checkpoint", "memory")
"""Top-level keys that do not change what a stage makes; nor does `evaluate` of a stage that trains."""

FORWARDED = (signal.SIGTERM, signal.SIGUSR2)

Action = Literal["run", "resume", "adopt", "skip", "redo", "refuse", "wait"]


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to a node, and why. fingerprint and inputs are None while an input does not exist."""

    action: Action
    reason: str
    inputs: Mapping[str, Source] | None = None
    fingerprint: str | None = None


def run_pipeline(
    pipeline: Pipeline, names: Sequence[str], *, redo: bool = False, launcher: str = "",
    rank_python: str | None = None,
) -> int:  # fmt: skip
    """Run the named nodes; the exit code of the first that does not end well (85: saved, start again), or 0.

    launcher: a command put before `python -m r1mega train` (`srun ...`); "": this machine, several ranks by torchrun.
    rank_python: the interpreter behind a launcher, such as that of a container; None: this one.
    Raises ConfigError before anything starts for what cannot work, and for a changed node unless redo is true.
    """
    check_pipeline(pipeline, names, dry_run=False, damaged=_damaged(pipeline))
    _write_description(pipeline)
    told, asked = False, threading.Event()
    for name in names:
        node = pipeline.nodes[name]
        decision = decide(node, pipeline, redo=redo)
        tell(f"[{pipeline.name}] {name}: {decision.action} ({decision.reason})")
        if decision.action in ("refuse", "wait"):
            raise ConfigError(f"node {name}: {decision.reason}")
        if decision.action == "redo":
            old = _move_aside(node.config.run_dir)
            print(f"[{pipeline.name}] {name}: the old run is kept as {old}", flush=True)
        if decision.action != "skip":
            code = _run_node(node, pipeline, decision, launcher, rank_python, asked)
            report = write_pipeline_report(pipeline.dir)
            if code == 0 and not told:
                tell(f"[{pipeline.name}] report so far: {report.resolve()} (written anew after each stage)")
                told = True
            if code != 0:
                print(f"[{pipeline.name}] {name}: {_ended(code)}", flush=True)
                return code
            if asked.is_set() and name != names[-1]:
                print(f"[{pipeline.name}] {name}: finished, and asked to stop; start again to go on", flush=True)
                return EXIT_SAVED_FOR_REQUEUE
    report = write_pipeline_report(pipeline.dir)
    for rung in read_ladder(pipeline.dir):
        length = "" if rung.length is None else f", {rung.length:.1f} tokens a response"
        tell(f"[{pipeline.name}] {rung.name}: accuracy {rung.accuracy:.3f}{length} ({rung.measured})")
    print(f"[{pipeline.name}] report: {report.resolve()}", flush=True)  # also where nothing else is told
    return 0


def dry_run(
    pipeline: Pipeline, names: Sequence[str], *, redo: bool = False, remember: bool = False, gpu: str = "h100-80"
) -> dict[str, Decision]:
    """What `run_pipeline` would do. Needs no input to exist; raises ConfigError like it, and where a GPU of this kind cannot
    hold a generator. Writes nothing, but with remember the hashes of what is given, so that large models are read once.
    """
    check_pipeline(pipeline, names, dry_run=True, damaged=_damaged(pipeline))
    problems = [
        f"{node.name} ({node.source}): {problem}"
        for node in in_turn(pipeline, dry_run=True, damaged=_damaged(pipeline))
        if node.name in names
        for problem in generator_refusals(node.config, node.source, node.ranks, gpu)
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    decisions: dict[str, Decision] = {}
    for name in names:
        node = pipeline.nodes[name]
        first = [parent for parent in node.parents if decisions.get(parent) and decisions[parent].action != "skip"]
        decision = decide(node, pipeline, redo=redo, write=remember)
        if first and decision.action != "refuse":
            state = "skipped only if they make the same again" if decision.action == "skip" else decision.reason
            reason = f"after {', '.join(first)}" + (f"; {state}" if decision.action != "wait" else "")
            again: Action = "redo" if redo and decision.action == "skip" else "run"
            decision = Decision(again if decision.action in ("skip", "wait") else decision.action, reason)
        decisions[name] = decision
    return decisions


def select(
    pipeline: Pipeline, first: str | None, last: str | None, only: str | None, *, last_option: str = "--until"
) -> list[str]:
    """Names of the nodes from `first` to `last`, or `only` one. last_option: what the command calls `last`.

    Raises ConfigError for an unknown name.
    """
    names = list(pipeline.nodes)
    for option, name in (("--from", first), (last_option, last), ("--only", only)):
        if name is not None and name not in names:
            raise ConfigError(f"{option} {name}: no such node in {pipeline.source}; there are {', '.join(names)}")
    if only is not None:
        return [only]
    chosen = names[names.index(first) if first else 0 : names.index(last) + 1 if last else None]
    if not chosen:
        raise ConfigError(f"--from {first} {last_option} {last}: {last} comes before {first}")
    return chosen


def decide(node: Node, pipeline: Pipeline, *, redo: bool, write: bool = True) -> Decision:
    """Compare a node with what its run directory and its parents record. write: hashes may be remembered on disk."""
    inputs, missing = _sources(node, pipeline, write)
    record, config = read_lineage(node.config.run_dir), covered(node.config)
    if missing:
        return Decision("wait", f"needs {', '.join(missing)}")
    key = fingerprint(config, inputs)

    def decision(action: Action, reason: str) -> Decision:
        return Decision(action, reason, inputs, key)

    if record is None:
        if not RunDirectory(node.config.run_dir).config.exists():
            return decision("run", "not started")
        if is_finished(node.config):
            return decision("adopt", "finished outside a pipeline: what its inputs were then is not recorded")
        return decision("resume", "started outside a pipeline, not finished")
    changes = _changes(node, record, config, inputs)
    if not changes and record.state == "finished":
        changes = [f"output {name} is not what it was" for name in changed_outputs(node.config.run_dir, record.outputs)]
    if changes and not (record.state != "finished" and not _has_work(node.config.run_dir)):
        if redo:
            return decision("redo", "changed: " + "; ".join(changes))
        text = "\n  ".join(changes)
        remedy = "--redo moves it aside and runs the node anew; or take it back, or use another dir"
        return decision("refuse", f"{node.config.run_dir} was made of something else:\n  {text}\n{remedy}")
    if record.state == "finished" and is_finished(node.config):
        return decision("skip", "finished; same config, inputs and outputs")
    why = {"failed": "failed before", "interrupted": "interrupted"}.get(record.state, "was cut short")
    return decision("resume", why)


def _damaged(pipeline: Pipeline) -> list[Path]:
    """Run directories of finished nodes whose outputs are not what they were: to be said by `decide`, not by what fails
    to read them.
    """
    directories = [node.config.run_dir for node in pipeline.nodes.values()]
    records = [(directory, read_lineage(directory)) for directory in directories]
    return [d for d, record in records if record and record.state == "finished" and changed_outputs(d, record.outputs)]


def covered(config: Stage) -> dict[str, Any]:
    """The part of a config that decides what comes out: without incidental keys and paths (inputs count by content)."""
    incidental = {*INCIDENTAL, *(("evaluate",) if isinstance(config, TrainingStage) else ())}
    return {key: _without_paths(value) for key, value in config.model_dump().items() if key not in incidental}


def _without_paths(value: Any) -> Any:
    if isinstance(value, Path):
        return None
    if isinstance(value, Mapping):
        return {key: _without_paths(inner) for key, inner in value.items()}
    return [_without_paths(inner) for inner in value] if isinstance(value, (tuple, list)) else value


def _sources(node: Node, pipeline: Pipeline, write: bool) -> tuple[dict[str, Source], list[str]]:
    """(inputs with their hashes, paths of those that do not exist yet)."""
    hashes = ContentHashes(pipeline.dir / "hashes.json")
    found, missing = {}, []
    for item in node.inputs:
        if item.key.split(".")[0] not in covered(node.config):
            continue
        if item.owner is None:
            content, origin = hashes.of(item.path, remember=write), item.key
        else:
            content, origin = _made(item.path, pipeline.nodes[item.owner])
        if content is None:
            missing.append(f"{item.path} ({origin})")
        else:
            found[item.key] = Source(str(item.path), content, item.owner)
    return found, missing


def _made(path: Path, owner: Node) -> tuple[str | None, str]:
    """(hash of what the owner made at `path`, None while it is not there as it was made; which of the two, in words)."""
    run_dir = owner.config.run_dir
    relative, record = os.path.relpath(path, run_dir), read_lineage(run_dir)
    if record is None or record.state != "finished":
        return None, f"made by {owner.name}"
    here = {name: s for name, s in record.outputs.items() if relative == "." or f"{name}/".startswith(f"{relative}/")}
    if damaged := changed_outputs(run_dir, here):
        return None, f"{', '.join(damaged)} is not what {owner.name} made"
    return record.output_hash(relative), f"made by {owner.name}"


def _changes(node: Node, record: Lineage, config: Mapping[str, Any], inputs: Mapping[str, Source]) -> list[str]:
    left_out = [key for key in type(node.config).model_fields if key not in config]
    changes = config_changes(record.config, config, node.config.run_dir / LINEAGE_FILE)
    lines = [line for key, line in changes if not is_below(key, (*layout_keys(config), *left_out))]
    for key in sorted(record.inputs.keys() | inputs.keys()):
        old, new = record.inputs.get(key), inputs.get(key)
        if old is None or new is None:
            lines.append(f"input {key} was {'added' if old is None else 'removed'}")
        elif old.sha256 != new.sha256:
            lines.append(f"the content of {key} = {new.path} is another")
    return lines


def _has_work(run_dir: Path) -> bool:
    return any(entry.name not in ("lineage.json", "lock") for entry in run_dir.iterdir())


def _move_aside(run_dir: Path) -> Path:
    with RunDirectory(run_dir).lock():  # nobody works in it
        old = run_dir.with_name(f"{run_dir.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
        return run_dir.rename(old)


def _run_node(
    node: Node, pipeline: Pipeline, decision: Decision, launcher: str, rank_python: str | None, asked: threading.Event
) -> int:
    if decision.fingerprint is None or decision.inputs is None:
        raise ConfigError(f"node {node.name}: an input does not exist")
    run_dir = node.config.run_dir
    before = read_lineage(run_dir)
    attempt = Attempt(now(), git_commit(PACKAGE))
    lineage = Lineage(
        node.name, node.config.stage, "running", decision.fingerprint, covered(node.config), dict(decision.inputs),
        attempts=(*(before.attempts if before else ()), attempt), adopted=decision.action == "adopt",
    )  # fmt: skip
    with RunDirectory(run_dir).lock():  # not while another start of the stage goes on
        write_lineage(run_dir, lineage)
    file = pipeline.dir / "nodes" / f"{node.name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, dump_config(node.config))
    code = _wait(command(node, file, launcher, rank_python), asked)
    states: dict[int, State] = {0: "finished", EXIT_SAVED_FOR_REQUEUE: "interrupted"}
    run = RunDirectory(run_dir)
    write_lineage(run_dir, dataclasses.replace(
        lineage,
        state=states.get(code, "failed"),
        outputs=stamp_outputs(run_dir) if code == 0 else {},
        attempts=(*lineage.attempts[:-1], dataclasses.replace(attempt, end=now(), exit_code=code)),
        environment=run.read_environment() if run.environment.exists() else {},
    ))  # fmt: skip
    return code


def command(node: Node, file: Path, launcher: str, rank_python: str | None = None) -> list[str]:
    """The command line that runs a node's resolved config."""
    program = [sys.executable, "-m", "r1mega", "train"]
    if launcher:
        return [*shlex.split(launcher), rank_python or sys.executable, *program[1:], str(file)]
    return [*program, *(["--ranks", str(node.ranks)] if node.ranks > 1 else []), str(file)]


def _wait(arguments: Sequence[str], asked: threading.Event) -> int:
    """Run a child with our output; SIGTERM and SIGUSR2 go on to it, and set `asked`: it may have been at its end. Its exit code, 128 + n
    when signal n ended it.
    """
    received: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def forward(number: int, _frame: Any) -> None:
        received.append(number)
        asked.set()
        if child is not None:
            child.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        child = subprocess.Popen(arguments)
        for number in received:  # that came before there was a child
            child.send_signal(number)
        try:
            code = child.wait()
        except KeyboardInterrupt:  # what several ranks save is not left running
            if not _terminal_told_all():
                child.send_signal(signal.SIGTERM)
            child.wait()
            raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _terminal_told_all() -> bool:
    """Whether a SIGINT of ours can be Ctrl-C, which children have got then too: we are what the terminal has in front."""
    try:
        with open("/dev/tty") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


def _ended(code: int) -> str:
    if code == EXIT_SAVED_FOR_REQUEUE:
        return "stopped with its state saved; start again to go on"
    return f"failed with exit code {code}" if code < 128 else f"ended by {signal.Signals(code - 128).name}"


def _write_description(pipeline: Pipeline) -> None:
    """DIR/pipeline.json, which the report reads."""
    pipeline.dir.mkdir(parents=True, exist_ok=True)
    nodes = [
        {
            "name": node.name, "stage": node.config.stage, "run_dir": str(node.config.run_dir),
            "config": str(node.source), "ranks": node.ranks, "parents": list(node.parents),
            "inputs": [{"key": i.key, "path": str(i.path), "owner": i.owner} for i in node.inputs],
        }
        for node in pipeline.nodes.values()
    ]  # fmt: skip
    content = {"name": pipeline.name, "source": str(pipeline.source), "nodes": nodes}
    write_atomic(pipeline.dir / PIPELINE_FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def describe(pipeline: Pipeline, decisions: Mapping[str, Decision]) -> list[str]:
    """A dry run for a person to read."""
    lines = [f"{pipeline.name}: {pipeline.source}, records in {pipeline.dir}"]
    for name, decision in decisions.items():
        node = pipeline.nodes[name]
        ranks = "1 process" if node.ranks == 1 else f"{node.ranks} processes"
        lines.append(f"{decision.action:>7}  {name} (stage {node.config.stage}, {ranks}): {decision.reason}")
        lines += [f"         {item.key} = {item.path}{_origin(item, pipeline)}" for item in node.inputs]
    return lines


def _origin(item: Any, pipeline: Pipeline) -> str:
    if item.owner is not None:
        return f"  <- {item.owner}"
    if item.path.exists():
        return ""
    given = any(is_inside(item.path, path) for path in pipeline.external)
    return "  (to be brought here)" if given else "  (missing)"


def jobs(pipeline: Pipeline, decisions: Mapping[str, Decision]) -> Iterable[str]:
    """For a scheduler, a line a node that is to run: name, machines, ranks a machine, parents that run.

    The parents are separated by commas; - stands for none. ConfigError when a node could not run.
    """
    if stuck := [f"node {name}: {d.reason}" for name, d in decisions.items() if d.action in ("refuse", "wait")]:
        raise ConfigError("\n".join(stuck))
    running = [name for name, decision in decisions.items() if decision.action != "skip"]
    for name in running:
        node, most = pipeline.nodes[name], pipeline.ranks_per_machine
        machines = -(-node.ranks // most)
        if node.ranks > most and node.ranks % most:
            raise ConfigError(f"node {name}: {node.ranks} ranks do not fill machines of {most}; see ranks_per_machine")
        parents = ",".join(p for p in node.parents if p in running) or "-"
        yield f"{name}\t{machines}\t{node.ranks // machines}\t{parents}"
