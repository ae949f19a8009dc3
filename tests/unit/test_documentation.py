"""Every command in the documentation parses as it stands, every file that it names is there, the API's pages can be made.

Commands are the lines of a block (indented, or fenced as `bash`) that begins with a known program, and code within a line that
does. In them a word in capitals (CONFIG, HOST:29500, DATA.jsonl) or a file that the page itself shows stands for something of
the reader's, a capital N for a number, and `...` for nothing.
"""

from __future__ import annotations

import argparse
import ast
import functools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import typer

from r1mega.cli import app
from r1mega.config.load import load_config
from r1mega.config.pipeline import load_pipeline

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").glob("*.md"))
OURS = ("r1mega", "python", "bash", "sbatch", "srun", "torchrun", "mpirun")
OTHERS = (".", "cd", "export", "git", "mypy", "pip", "pre-commit", "ruff", "tail")
"""Of these nothing is known here but that a shell can read the line."""


class Command(NamedTuple):
    """One command of a page; words without variables that are set before it and without redirections."""

    page: Path
    line: int
    words: tuple[str, ...]
    is_block: bool

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}: {' '.join(self.words)}"


def blocks(text: str) -> Iterator[tuple[int, str, bool]]:
    """(number of the first line, text, whether it is a block) of indented blocks, of those fenced as bash or as nothing, and of code within a line."""
    fenced = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
    plain = fenced.sub(lambda match: "\n" * match[0].count("\n"), text)
    found = [(match.start(2), match[2]) for match in fenced.finditer(text) if match[1] in ("", "bash", "sh")]
    offsets = {text.count("\n", 0, start) + 1: content for start, content in found}
    for match in re.finditer(r"(?:^(?: {4}.*)?\n)*^ {4}.*$", plain, re.M):
        offsets[plain.count("\n", 0, match.start()) + 1] = re.sub(r"^ {4}", "", match[0], flags=re.M)
    yield from ((number, content, True) for number, content in offsets.items())
    for match in re.finditer(r"^ {0,3}\S.*$", plain, re.M):
        number = plain.count("\n", 0, match.start()) + 1
        yield from ((number, span, False) for span in re.findall(r"`([^`]+)`", match[0]) if " " in span)


def commands_of(page: Path, text: str) -> Iterator[Command]:
    for number, block, is_block in blocks(text):
        lines = re.sub(r"\\\n", lambda _: "\0", block).split("\n")
        for line in lines:
            words = (
                shlex.split(line.replace("\0", " "), comments=True) if is_command(lines) or is_command([line]) else []
            )
            for part in parts(words):
                assert program(part) in OURS + OTHERS, (
                    f"{page.name}:{number}: {part[0]!r} is none of the programs known here"
                )
                yield Command(page, number, tuple(part), is_block)
            number += 1 + line.count("\0")


def is_command(lines: list[str]) -> bool:
    """Whether the first line with anything in it starts a program of ours, or a block of others' without being prose."""
    first = next((re.sub(r"^(?:[A-Z_]\w*=\S+ +)*", "", line) for line in lines if line.strip()), "")
    return bool(first.split()) and program(first.split()) in OURS + OTHERS[1:] + (". .venv/bin/activate",)


def program(words: list[str]) -> str:
    """The first word, `python` for the path of one."""
    return "python" if words[0].endswith("/python") else words[0]


def parts(words: list[str]) -> Iterator[list[str]]:
    """The commands of a line, without variables, redirections, and the signs of a usage: [--cuda | --no-cuda]."""
    words = [word.strip("[]") for word in words if word != "..."]
    part: list[str] = []
    for index, word in enumerate(words):
        if word == "&&":
            yield part
            part = []
        elif word in ("<", ">", "|") or words[index - 1 : index] in (["<"], [">"]):
            continue
        elif part or not re.match(r"[A-Z_]\w*=", word):
            part.append(word)
    if part:
        yield part


COMMANDS = [command for page in PAGES for command in commands_of(page, page.read_text())]


def check(command: Command) -> None:
    """AssertionError, ConfigError, SystemExit or click's UsageError unless the command could start."""
    first, words = program(list(command.words)), list(command.words[1:])
    if first in ("srun", "torchrun", "mpirun"):
        start = next(i for i, word in enumerate(words) if word in ("-m", "python") or word.endswith(".py"))
        first, words = "python", words[start + (words[start] == "python") :]
    if first == "r1mega":
        check_cli(command, words)
    elif first == "python":
        check_python(command, words)
    elif first in ("bash", "sbatch"):
        check_script(command, words)


def check_python(command: Command, words: list[str]) -> None:
    """`python -m MODULE ...`, `python -c TEXT` or `python FILE ...`."""
    if words[0] == "-c":
        exec(words[1], {})
    elif words[0] != "-m":
        check_parser(command, ROOT / words[0], words[1:])
    elif words[1] in ("r1mega", "tests.te.run"):
        check_cli(command, words[2:])
    elif words[1] == "pytest":
        assert [word for word in words[2:] if "/" in word and not (ROOT / word).exists()] == []
    elif words[1] != "pdoc":
        check_parser(command, ROOT / (words[1].replace(".", "/") + ".py"), words[2:])


def check_cli(command: Command, words: list[str]) -> None:
    """By typer's own parser; of a command that is only mentioned, the name."""
    parser = typer.main.get_command(app)
    while hasattr(parser, "commands"):
        assert words and words[0] in parser.commands, f"no command {words[:1]}"
        name, *words = words
        parser = parser.commands[name]
    if words or command.is_block:
        params = parser.make_context(name, ["1" if word == "N" else word for word in words]).params
        if params.get("config") is not None and name != "convert":
            check_config(command, str(params["config"]), params["overrides"] or [])


def check_script(command: Command, words: list[str]) -> None:
    """A script of launch/ (or .ci/run): it is there, knows each option, and can load the config that it gets."""
    start = next(index for index, word in enumerate(words) if not word.startswith("-"))
    script, *rest = words[start:]
    text = (ROOT / script).read_text()
    if passed_on := re.search(r"^exec r1mega (\w+) .*\"\$@\"$", text, re.M):
        return check_cli(command, [passed_on[1], *rest])
    for word in rest:
        option = re.escape(word.partition("=")[0])
        assert not word.startswith("--") or re.search(rf"{option}(?:=\*)?(?: \||\))", text), f"{script}: no {word}"
        assert "/" not in word or "=" in word or (ROOT / word).exists(), f"{word} is not there"
    config = [word for word in rest if word.endswith(".yaml")]
    if config:
        check_config(command, config[0], [word for word in rest if "=" in word and not word.startswith("--")])


def check_config(command: Command, config: str, overrides: list[str]) -> None:
    """The file is there and takes the overrides; the reader's own file is taken for one of stage zero."""
    if re.fullmatch(r"[A-Z]+", config) or f"# {config}" in command.page.read_text():
        config = "configs/nano/r1.yaml" if "pipeline" in command.words else "configs/nano/zero.yaml"
    overrides = [re.sub(r"N\b", "1", override) for override in overrides]
    is_pipeline = re.search(r"^nodes:", (ROOT / config).read_text(), re.M) is not None
    load(Path(config), tuple(overrides), is_pipeline)


@functools.cache
def load(config: Path, overrides: tuple[str, ...], is_pipeline: bool) -> None:
    (load_pipeline if is_pipeline else load_config)(config, overrides)


def check_parser(command: Command, script: Path, words: list[str]) -> None:
    """By the script's own parser, which is made of its source: importing it would take a library's time for each."""
    source = script.read_text()
    if "runpy.run_path" in source:  # another script, in other circumstances
        script = ROOT / re.findall(r"\"(tools/\w+\.py)\"", source)[0]
        source = script.read_text()
    parser = parser_of(source)
    if 'sys.argv.insert(1, "convert")' in source:
        check_cli(command, ["convert", *words])
    elif parser is None:
        assert words == [] and '__name__ == "__main__"' in source, f"{script.name} takes no arguments"
    else:
        given = (parser.parse_intermixed_args if "parse_intermixed_args" in source else parser.parse_args)(words)
        if hasattr(given, "overrides"):
            check_config(command, str(given.config), given.overrides)


def parser_of(source: str) -> argparse.ArgumentParser | None:
    """The parser that a script makes: its `ArgumentParser(...)` and every `add_argument`, without what the script defines itself."""
    tree = ast.parse(source)
    known = {"argparse": argparse, "Path": Path, "int": int, "float": float}
    kept = {"ArgumentParser", "add_argument", "add_argument_group", "add_mutually_exclusive_group"}
    for function in ast.walk(tree):
        for node in function.body if isinstance(function, ast.FunctionDef) else ():
            calls = [call for call in ast.walk(node) if isinstance(call, ast.Call) and called(call) in kept]
            if not calls or isinstance(node, ast.Return):
                continue
            for call in calls:
                call.keywords = [
                    keyword
                    for keyword in call.keywords
                    if {name.id for name in ast.walk(keyword) if isinstance(name, ast.Name)} <= set(known)
                ]
            exec(compile(ast.Module([node], []), "parser", "exec"), known)
    return known.get("parser")


def called(call: ast.Call) -> str:
    """The last name of what is called."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_every_command_of_the_documentation_parses(command):
    check(command)


def test_commands_are_found():
    """As many as a reader finds, of each kind, in the README and elsewhere."""
    shown = {program(list(command.words)) for command in COMMANDS}
    assert set(OURS) <= shown
    assert len([command for command in COMMANDS if command.page.name == "README.md"]) >= 13
    assert len(COMMANDS) > 80


@pytest.mark.parametrize(
    "line",
    [
        "r1mega trian configs/nano/zero.yaml",
        "r1mega train configs/nano/zer0.yaml",
        "r1mega train configs/nano/zero.yaml rollout.temprature=1",
        "r1mega doctor configs/nano/zero.yaml --fast",
        "r1mega pipeline configs/nano/r1.yaml zero.stepz=3",
        "python -m r1mega train",
        "python tools/gone.py",
        "python tools/run_claims.py --claim-numbers 1",
        "python tools/bench_update.py configs/nano/zero.yaml rollout.num_promts=4",
        "bash launch/quickstart.sh --until zero",
        "bash launch/gone.sh",
        "sbatch --nodes=2 launch/stage0.sh configs/nano/zero.yaml parallel.tensor=8",
        "torchrun --nproc-per-node=4 -m r1mega train configs/nano/zero.yaml stage=0",
    ],
)
def test_a_command_that_is_wrong_is_found(line):
    (command,) = commands_of(ROOT / "README.md", f"text\n\n    {line}    # why\n")
    assert command.line == 3
    with pytest.raises((Exception, SystemExit)) as error:
        check(command)
    assert not isinstance(error.value, (TypeError, AttributeError, StopIteration, KeyError, NameError)), error.value


PAGES_OF_THE_API = """
import sys, pdoc.doc, pdoc.extract, pdoc.render
modules = {name: pdoc.doc.Module(pdoc.extract.load_module(name)) for name in pdoc.extract.walk_specs(["r1mega", "r1mega_kernels"])}
pages = [pdoc.render.html_module(modules[name], modules) for name in modules if name.count(".") < 2]  # most of the time goes here
import torch
print(len(pages), torch.cuda.is_initialized(), "transformer_engine" in sys.modules, *modules)
"""


@pytest.mark.heavy
def test_the_pages_of_the_api_can_be_made_without_a_gpu():
    """Every module imports in pdoc's order, with nothing of CUDA; those of the rooms are rendered."""
    pytest.importorskip("pdoc")
    made = subprocess.run(
        [sys.executable, "-W", "default::UserWarning", "-c", PAGES_OF_THE_API],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert made.returncode == 0 and "Couldn't import" not in made.stderr, made.stderr[-2000:]
    pages, *cuda, names = made.stdout.split(maxsplit=3)
    assert int(pages) > 20 and cuda == ["False", "False"]
    files = [path.relative_to(ROOT) for path in (ROOT / "r1mega").rglob("*.py") if path.stem != "__main__"]
    modules = [file.parent if file.stem == "__init__" else file.with_suffix("") for file in files]
    closed = {name for name in modules if "\n__all__ = " in source_of(name)}  # it shows what it names, not its modules
    assert {".".join(name.parts) for name in modules if not closed & set(name.parents)} <= set(names.split())


def source_of(module: Path) -> str:
    package = ROOT / module / "__init__.py"
    return package.read_text() if package.exists() else ""


def test_every_file_that_the_documentation_names_is_there():
    for page in PAGES:
        named = set(
            re.findall(
                r"\b(?:configs|launch|tools|tests|docs|r1mega)/[\w./]+\.(?:yaml|sh|py|md|jsonl)\b", page.read_text()
            )
        )
        assert not [file for file in sorted(named) if not (ROOT / file).is_file()], page
