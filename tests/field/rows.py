"""Files of rows, written and read."""

import json

from typer.testing import CliRunner

from r1mega.cli import app
from r1mega.config.schema import DataConfig
from r1mega.data.prompts import read_records
from r1mega.errors import DataError
from r1mega.evaluate.forms import FormOptions
from r1mega.evaluate.tasks import TASKS, load_task


def write(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def records(*paths, **keys):
    return list(read_records(DataConfig(prompts=paths, **keys)))


def task(name, path):
    return load_task(TASKS[name], path, FormOptions())


def score(kind, content):
    """`r1mega reward KIND` with this on its standard input."""
    return CliRunner().invoke(app, ["reward", kind], input=content)


def assert_refused(done, message):
    assert isinstance(done.exception, DataError) and message in str(done.exception), done
