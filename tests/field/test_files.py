"""Configuration values and files: read alike wherever they are written; a file that the system does not give is named."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import Field

from r1mega import cli, ending
from r1mega.config.load import dump_config, load_config
from r1mega.config.schema import Section
from r1mega.config.yaml_text import dump_yaml, load_yaml
from r1mega.data.prompts import read_records
from r1mega.data.rows import read_rows
from r1mega.errors import EXIT_FILE, ConfigError, DataError, StragglerError
from r1mega.evaluate.run import evaluate_checkpoint, generate_text
from r1mega.files import JsonLinesWriter, check_writable, write_atomic

ZERO = "stage: zero\nrun_dir: runs/x\nmodel: {path: m}\ndata: {prompts: [p.jsonl]}\n"


def both_ways(tmp_path, key, text):
    """What a key becomes, written in a file and on the command line: the value or the error, which must be alike."""
    found = []
    parts = key.split(".")
    own = "".join(f"{'  ' * depth}{part}:\n" for depth, part in enumerate(parts))[:-1] + f" {text}\n"
    (tmp_path / "base.yaml").write_text(ZERO)
    for written in (True, False):
        path = tmp_path / f"{written}.yaml"
        path.write_text("include: base.yaml\n" + (own if written else ""))
        try:
            value = load_config(path, [] if written else [f"{key}={text}"])
            for part in parts:
                value = getattr(value, part)
            found.append(value)
        except ConfigError as error:
            found.append(str(error).partition(": ")[2].partition(":")[2])
    assert found[0] == found[1] and type(found[0]) is type(found[1]), found
    return found[0]


# ------------------------------------------------------------------------------- numbers: what is one, what is none


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("steps", "1e3", 1000), ("steps", "1E3", 1000), ("steps", "2.5e2", 250), ("steps", "1e+2", 100), ("steps", "1_000", 1000),
        ("steps", "0x10", 16), ("steps", "+7", 7), ("steps", "'12'", 12), ("steps", "'1e3'", 1000), ("steps", "5.0", 5),
        ("reward.judge.low", "-3", -3), ("seed", "0", 0), ("optimizer.lr", "1e-5", 1e-5), ("optimizer.lr", "3", 3.0),
        ("optimizer.lr", ".5", 0.5), ("optimizer.lr", "1.e-3", 1e-3), ("optimizer.lr", "1_0.5", 10.5),
        ("optimizer.decay_steps", "null", None), ("optimizer.decay_steps", "1e2", 100),
        ("parallel.layers_per_stage", "[1, 1e1, '3']", (1, 10, 3)), ("rollout.kv_cache_bytes", "1e9", 10**9),
    ],
)  # fmt: skip
def test_numbers(tmp_path, key, text, value):
    assert both_ways(tmp_path, key, text) == value


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (key, text)
        for key in ("steps", "optimizer.lr", "threads")
        for text in ("true", "no", "inf", ".inf", "-.inf", ".nan", "nan", "010", "0o10", "-007", "1:30", "1e999", "'010'", "ten", "1__0")
    ] + [("parallel.layers_per_stage", "[true, 2]"), ("parallel.layers_per_stage", "[010]"), ("steps", "1.5")],
)  # fmt: skip
def test_what_is_no_number(tmp_path, key, text):
    assert isinstance(both_ways(tmp_path, key, text), str)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("parallel.sp", "yes", True), ("parallel.sp", "off", False), ("parallel.sp", "TRUE", True), ("parallel.sp", "null", None),
        ("observe.tensorboard", "no", False), ("model.fp8", "off", "off"), ("reward.language.target", "'no'", "no"),
        ("observe.wandb_project", "'1e3'", "1e3"), ("run_dir", "010", Path("010")),
    ],
)  # fmt: skip
def test_truth_values_and_texts(tmp_path, key, text, value):
    assert both_ways(tmp_path, key, text) == value


@pytest.mark.parametrize(
    ("key", "text"), [("parallel.sp", "1"), ("observe.tensorboard", "0"), ("observe.tensorboard", "1.0")]
)
def test_numbers_are_no_truth_values(tmp_path, key, text):
    assert "true or false" in both_ways(tmp_path, key, text)


def test_numbers_of_the_environment(tmp_path, monkeypatch):
    (tmp_path / "x.yaml").write_text(ZERO + "steps: ${oc.env:MY_STEPS}\n")
    for text, steps in (("12", 12), ("1e2", 100)):
        monkeypatch.setenv("MY_STEPS", text)
        assert load_config(tmp_path / "x.yaml").steps == steps
    for text in ("012", "true", "inf", ""):
        monkeypatch.setenv("MY_STEPS", text)
        with pytest.raises(ConfigError, match="steps = .*number"):
            load_config(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    "text", ["1e3", "010", "0o10", "1:30", "yes", "~", "1_000", "2024-08-01", ".5", "null", "0x10", "-", "1e"]
)
def test_texts_that_look_like_numbers_survive_the_stored_config(tmp_path, text):
    import yaml

    assert load_yaml(dump_yaml({"key": text})) == {"key": text} == yaml.safe_load(dump_yaml({"key": text}))
    quoted = json.dumps(text)
    path = tmp_path / "x.yaml"
    path.write_text(ZERO)
    config = load_config(
        path, [f"observe.wandb_project='{quoted}'"] if text == "-" else [f"observe.wandb_project={quoted}"]
    )
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_sections_of_ones_own_read_alike(tmp_path):
    class Mine(Section):
        sizes: dict[str, int] = {}
        files: list[Path] = Field(default_factory=list)
        either: int | str = 1

    mine = Mine.model_validate({"sizes": {"a": "1e2"}, "files": ["~/x"], "either": "010"})
    assert (mine.sizes, mine.files, mine.either) == ({"a": 100}, [Path.home() / "x"], "010")
    for bad in ({"sizes": {"a": True}}, {"sizes": {"a": "010"}}):
        with pytest.raises(ValueError, match="number"):
            Mine.model_validate(bad)


@pytest.mark.parametrize(
    "options",
    [{"temperature": float("nan")}, {"temperature": float("inf")}, {"top_p": float("nan")}, {"num_samples": 0}],
)
def test_settings_of_commands_are_checked_before_the_model(tmp_path, options):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=next(iter(options))):
        evaluate_checkpoint(tmp_path, tmp_path / "p.jsonl", **options)
    with pytest.raises(ConfigError, match=next(iter(options))):
        generate_text(tmp_path, "q", **options)


# --------------------------------------------------------------------------------------------------- ~ in paths


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("key", "text"),
    [("run_dir", "~/x"), ("model.path", "~/m/hf"), ("run_dir", "'~/x'"), ("reward.sandbox.python", "~/x")],
)
def test_the_home_directory(tmp_path, home, key, text):
    assert both_ways(tmp_path, key, text) == home / text.strip("'")[2:]


def test_a_lone_tilde_is_null(tmp_path, home):
    (tmp_path / "x.yaml").write_text(ZERO)
    (tmp_path / "y.yaml").write_text(ZERO.replace("runs/x", "~"))
    for name, overrides in (("x.yaml", ["run_dir=~"]), ("y.yaml", [])):
        with pytest.raises(
            ConfigError, match="run_dir = None: must be a path, not null; YAML reads a lone ~ so.* is ~/"
        ):
            load_config(tmp_path / name, overrides)
    for written in ("~/", "'~'"):
        assert load_config(tmp_path / "x.yaml", [f"run_dir={written}"]).run_dir == home


def test_a_seed_is_not_negative(tmp_path):
    (tmp_path / "x.yaml").write_text(ZERO)
    with pytest.raises(ConfigError, match="seed = -1: .*greater than or equal to 0"):
        load_config(tmp_path / "x.yaml", ["seed=-1"])


def test_the_home_directory_elsewhere(tmp_path, home):
    (home / "common.yaml").write_text("seed: 5\n")
    (tmp_path / "x.yaml").write_text("include: ~/common.yaml\n" + ZERO)
    config = load_config(tmp_path / "x.yaml", ["data.prompts=[~/a.jsonl, b.jsonl]", "reward.sandbox.libraries=[~/lib]"])
    assert config.seed == 5 and config.data.prompts == (home / "a.jsonl", Path("b.jsonl"))
    assert config.reward.sandbox.libraries == (home / "lib",)
    assert load_config(tmp_path / "x.yaml", ["run_dir='${model.path}/x'", "model.path=~/m"]).run_dir == home / "m/x"
    with pytest.raises(ConfigError, match="no such home directory"):
        load_config(tmp_path / "x.yaml", ["run_dir=~nobody-here/x"])


def test_the_home_directory_on_the_command_line(home, capsys, monkeypatch):
    (home / "p.jsonl").write_text('{"question": "q"}\n')
    for arguments, place in ((["report", "~/gone"], "gone"), (["compare", "~/a.json", "~/b.json"], "a.json")):
        assert run(monkeypatch, arguments) == 3
        assert str(home / place) in capsys.readouterr().err
    assert not Path("~").exists()


# ----------------------------------------------------------------------------- files that the system does not give


def run(monkeypatch, arguments):
    """The exit code of `r1mega ARGUMENTS`."""
    monkeypatch.setattr("sys.argv", ["r1mega", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


@pytest.fixture
def small_disk():
    """No file may become larger than a page."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def impossible(tmp_path):
    """Paths that not even root can write to."""
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "directory").mkdir(exist_ok=True)
    return [
        tmp_path / "gone/x.json", tmp_path / "file/x.json", tmp_path / "loop/x.json", tmp_path / ("x" * 300), tmp_path / "directory",
        Path("/proc/x.json"),
    ]  # fmt: skip


def test_eval_finds_out_before_the_work_that_it_cannot_write(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text("{}")
    for path in impossible(tmp_path):
        assert run(monkeypatch, ["eval", tmp_path, tmp_path / "p.jsonl", "--output", path]) == 2
        told = capsys.readouterr().err
        assert f"output {path}: cannot be written (" in told and "Traceback" not in told
    check_writable(tmp_path / "new.json")
    assert not list(tmp_path.glob("*new.json*")), "nothing is left of the trial"


def test_a_write_that_fails_names_the_path(tmp_path):
    for path in impossible(tmp_path):
        with pytest.raises(OSError, match=".") as raised:
            write_atomic(path, "x")
        assert raised.value.filename == str(path) and not list(tmp_path.rglob("*.tmp"))


def test_a_full_disk_names_the_path(tmp_path, small_disk):
    with pytest.raises(OSError, match="File too large") as raised:
        write_atomic(tmp_path / "x.json", "x" * 10_000)
    assert raised.value.filename == str(tmp_path / "x.json") and not list(tmp_path.iterdir())
    lines = JsonLinesWriter(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match="File too large") as raised:
        for step in range(10):
            lines.write({"step": step, "text": "x" * 1000})
    assert raised.value.filename == str(tmp_path / "metrics.jsonl")
    lines.close()


@pytest.mark.parametrize("command", ["report", "generate", "eval", "compare", "convert"])
def test_commands_end_with_a_message_and_a_code(tmp_path, monkeypatch, capsys, command):
    """Where a file should be there is a directory, or a loop of links."""
    model, results = tmp_path / "model", tmp_path / "results.json"
    (model / "config.json").mkdir(parents=True)
    results.symlink_to(results)
    arguments = {
        "report": ["report", tmp_path / "run"], "generate": ["generate", model, "q"], "eval": ["eval", model, "p.jsonl"],
        "compare": ["compare", results, results], "convert": ["convert", "--to-megatron", model, tmp_path / "out"],
    }  # fmt: skip
    (tmp_path / "run/metrics.jsonl").mkdir(parents=True)
    (tmp_path / "run/config.yaml").mkdir()
    code = run(monkeypatch, arguments[command])
    told = capsys.readouterr().err
    assert code in (EXIT_FILE, 3, 4) and str(tmp_path) in told and "Traceback" not in told


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (PermissionError(13, "Permission denied", "/a/b"), "PermissionError: /a/b: Permission denied"),
        (OSError(28, "No space left on device"), "a file could not be written or read: No space left on device"),
        (OSError(18, "Invalid cross-device link", "/a", None, "/b"), "/a -> /b: Invalid cross-device link"),
        (FileNotFoundError(2, "No such file or directory", b"x"), "x: No such file or directory"),
    ],
)
def test_the_message(monkeypatch, capsys, error, text):
    def fail():
        raise error

    monkeypatch.setattr(cli, "app", fail)
    assert run(monkeypatch, []) == EXIT_FILE and text in capsys.readouterr().err
    monkeypatch.setenv("R1MEGA_TRACEBACK", "1")
    with pytest.raises(OSError, match="."):
        cli.main()


def test_a_standard_output_that_cannot_be_written():
    pair = json.dumps({"gold": "1", "prediction": "1"}) + "\n"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "r1mega", "reward", "math"], input=pair, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )  # fmt: skip
    assert done.returncode == EXIT_FILE and "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_a_rank_that_lost_another_tells_it_and_ends_after_that_one(monkeypatch, capsys):
    """The launcher takes the exit code of the first that ends, and that one's is the cause."""
    order = []

    def fail():
        raise StragglerError("another rank ended")

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(ending, "exit_on_signals", order.append)
    monkeypatch.setattr(ending.time, "sleep", lambda seconds: order.append((capsys.readouterr().err, seconds)))
    assert run(monkeypatch, []) == StragglerError.exit_code
    assert order == [StragglerError.exit_code, ("StragglerError: another rank ended\n", ending.SECONDS_FOR_THE_CAUSE)]


def test_a_rank_that_is_ended_while_it_waits_for_the_cause_saves_nothing():
    """SIGTERM of the launcher, once that one has ended: 85 would say that the state is saved, and srun tells the highest code."""
    waits = (
        "import os, signal, time; from r1mega import cli, ending; from r1mega.errors import StragglerError\n"
        "def app():\n    ending.requeue_on_signals()\n    raise StragglerError('another rank ended')\n"
        "cli.app, time.sleep = app, lambda _: os.kill(os.getpid(), signal.SIGTERM)\ncli.main()"
    )
    assert subprocess.run([sys.executable, "-c", waits], capture_output=True).returncode == StragglerError.exit_code


@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR2"])
def test_a_signal_in_the_interpreters_end_leaves_the_exit_code(number):
    """When Python has no handlers any more: what of an object's end comes after them sends it."""
    ends = (
        "import os, signal; from r1mega import ending\n"
        f"class Late:\n    def __del__(self, kill=os.kill, pid=os.getpid()): kill(pid, {getattr(signal, number):d})\n"
        "late = Late(); ending.requeue_on_signals(); ending.leave(3)"
    )
    assert subprocess.run([sys.executable, "-c", ends], capture_output=True).returncode == 3


@pytest.mark.parametrize(
    ("ends", "more", "code", "told", "errors"),
    [
        ("raise SystemExit(3)", "", 3, "thread handler", ""),
        ("return", "", 0, "thread handler", ""),
        ("raise SystemExit('why')", "", 1, "thread handler", "why"),
        ("raise SystemExit('')", "", 1, "thread handler", ""),
        ("raise ValueError('which')", "", 1, "thread handler", "ValueError: which"),
        ("raise SystemExit(3)", "sys.modules['mpi4py.MPI'] = sys", 3, "thread handler taken down", ""),
        ("raise SystemExit(3)", "ending.NVIDIA = pathlib.Path('/')", 3, "thread handler taken down", ""),
        ("raise SystemExit(3)", "sys.setprofile(slice)", 3, "thread handler taken down", ""),
    ],
    ids=["code", "without", "text", "no text", "error", "MPI", "GPU", "profiler"],
)
def test_a_command_ends_as_python_does_and_takes_down_what_needs_it_alone(ends, more, code, told, errors):
    program = (
        "import atexit, pathlib, sys, threading, time; from r1mega import ending; ending.NVIDIA = pathlib.Path('/no')\n"
        "class Late:\n    def __del__(self, say=print): say('taken down', end='')\n"
        f"late = Late()\n{more}\n"
        "def main():\n    atexit.register(print, 'handler', end=' ')\n"
        "    threading.Thread(target=lambda: (time.sleep(0.2), print('thread', end=' '))).start()\n"
        f"    {ends}\nending.run(main)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (code, told) and done.stderr.endswith(errors and f"{errors}\n")


def test_what_a_command_has_left_open_is_written_and_what_c_has_to_do_is_done(tmp_path):
    program = (
        "import ctypes, pathlib, sys; from r1mega import ending; ending.NVIDIA = pathlib.Path('/no')\n"
        f"file = open({str(tmp_path / 'log')!r}, 'w')\n"
        "def main():\n    file.write('of a plug-in')\n    ctypes.CDLL(None).printf(b'of C')\n"
        "    sys.stdout.close()  # Python's alone\n    raise SystemExit(3)\nending.run(main)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (3, "of C", "")
    assert (tmp_path / "log").read_text() == "of a plug-in"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_command_that_has_failed_does_not_ask_to_be_started_again(rank):
    """SIGTERM while it waits for the first to tell, and after it has told."""
    fails = (
        "import os, signal, sys, time; from r1mega import cli, ending; from r1mega.errors import DataError\n"
        "def app():\n    ending.requeue_on_signals()\n    raise DataError('q.jsonl:3')\n"
        "end = lambda _: os.kill(os.getpid(), signal.SIGTERM)\n"
        "cli.app, time.sleep, sys.exit = app, end, end\ncli.main()"
    )
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-c", fails], capture_output=True, text=True, env=os.environ | place, check=False
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (DataError.exit_code, "DataError: q.jsonl:3\n" if rank == "0" else "")


def test_an_error_that_is_about_no_file_keeps_its_traceback(monkeypatch):
    def fail():
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(ConnectionResetError):
        cli.main()


def test_data_files_that_cannot_be_read(tmp_path):
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    with pytest.raises(DataError, match="loop.jsonl: "):
        list(read_rows(tmp_path / "loop.jsonl"))
    config = load_config(Path("configs/nano/zero.yaml"), [f"data.prompts=[{tmp_path}/x.jsonl]"]).data
    with pytest.raises(DataError, match="x.jsonl: no such file"):
        list(read_records(config))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting wants root")
def test_a_read_only_file_system(tmp_path, monkeypatch, capsys):
    target = tmp_path / "ro"
    target.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", target], capture_output=True, check=False
    ).returncode:
        pytest.skip("no mounting here")
    try:
        (tmp_path / "config.json").write_text("{}")
        assert run(monkeypatch, ["eval", tmp_path, tmp_path / "p.jsonl", "--output", target / "x.json"]) == 2
        assert "Read-only file system" in capsys.readouterr().err
        config = "configs/nano/zero.yaml"
        assert run(monkeypatch, ["train", config, f"run_dir={target}/run", f"model.path={tmp_path}"]) in (2, 3)
        assert "Traceback" not in capsys.readouterr().err
    finally:
        subprocess.run(["umount", target], check=True)
