"""A run that is started again with other contents under the same names is stopped, and the advice works."""

import json
import os
import shutil

import pytest

from r1mega.config.load import load_config
from r1mega.data import nano_tokenizer
from r1mega.errors import CheckpointError, DataError
from r1mega.observe import inputs
from r1mega.observe.inputs import check_inputs, record_inputs
from r1mega.observe.run import RunDirectory
from r1mega.stages import check_run_directory

HF = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 64}


@pytest.fixture
def begun(tmp_path):
    """A run of RL that has made something; its config."""
    for name in ("model", "judge"):
        (tmp_path / name).mkdir()
        nano_tokenizer.train_tokenizer(tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(HF))
        (tmp_path / name / "model.safetensors").write_bytes(os.urandom(6 << 20))
    for name in ("p", "q", "e"):
        (tmp_path / f"{name}.jsonl").write_text('{"question": "a 1", "answer": "1"}\n')
    config = load_config("configs/nano/zero.yaml", [
        f"model.path={tmp_path}/model", f"run_dir={tmp_path}/run", f"data.prompts=[{tmp_path}/p.jsonl,{tmp_path}/q.jsonl]",
        f"evaluate.data={tmp_path}/e.jsonl", "reward.helpfulness.weight=1", f"reward.helpfulness.model={tmp_path}/judge",
    ])  # fmt: skip
    directory = RunDirectory(config.run_dir)
    with directory.lock():
        directory.write_config(config.model_dump(mode="json"))
    record_inputs(config)
    directory.metrics.write_text('{"step": 1}\n')
    check_inputs(config)
    return config


def replace_byte(path, place=-3):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("name", "key"), [
    ("q.jsonl", "data.prompts[1]"), ("model/tokenizer.json", "model.path"), ("judge/config.json", "reward.helpfulness.model"),
])  # fmt: skip
def test_one_byte_is_told_by_key_and_path(begun, tmp_path, name, key):
    path = tmp_path / name
    before = path.read_bytes()
    replace_byte(path)
    with pytest.raises(DataError, match="not what this run began with") as raised:
        check_inputs(begun)
    assert f"  {key}: {path} has another content\n" in str(raised.value)
    path.write_bytes(before)  # "put it back": at another time
    check_inputs(begun)
    record = begun.run_dir / "inputs.json"
    offered = f"remove {record}" in str(raised.value)
    assert offered != key.startswith("data."), "of data a run has other records, which do not go with this one"
    if offered:
        replace_byte(path)
        record.unlink()  # "to go on with what is there now"
        record_inputs(begun)
        check_inputs(begun)


@pytest.mark.parametrize("change", [os.utime, lambda path: path.chmod(0o640), lambda path: shutil.copy2(path, f"{path}.copy")],
                         ids=["written", "other rights", "copied or restored"])  # fmt: skip
def test_new_times_of_the_same_contents_are_kept(begun, tmp_path, monkeypatch, change):
    path = tmp_path / "judge" / "model.safetensors"
    if (copy := change(path)) is not None:
        os.replace(copy, path)
    check_inputs(begun)  # as doctor does: nothing is written
    read = []
    monkeypatch.setattr(
        inputs, "_digest", lambda file, size, real=inputs._digest: read.append(file) or real(file, size)
    )
    for _ in range(2):
        check_inputs(begun, renew=True)
    assert read == [path]


@pytest.mark.parametrize("replaced", [False, True])
def test_another_content_of_the_same_size_and_time(begun, tmp_path, replaced):
    """As `rsync -t`, `cp -p` and `touch -r` leave it: written in place, or another file in its place."""
    path = tmp_path / "q.jsonl"
    before = path.stat()
    if replaced:
        path = shutil.copy2(path, tmp_path / "copy")
    replace_byte(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    path = path.rename(tmp_path / "q.jsonl")
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(DataError, match=r"q\.jsonl has another content"):
        check_inputs(begun)


def test_a_record_of_before_inodes_were_kept_is_read_once_and_completed(begun, monkeypatch):
    record = json.loads((begun.run_dir / "inputs.json").read_text())
    files = [stamp for entry in record.values() for stamp in entry["files"].values()]
    for stamp in files:
        del stamp["ctime_ns"], stamp["inode"]
    (begun.run_dir / "inputs.json").write_text(json.dumps(record))
    read = []
    monkeypatch.setattr(
        inputs, "_digest", lambda file, size, real=inputs._digest: read.append(file) or real(file, size)
    )
    for _ in range(2):
        check_inputs(begun, renew=True)
        assert len(read) == len(files)


def test_files_that_nothing_reads(begun, tmp_path):
    (tmp_path / "model" / "notes.md").write_text("mine")  # beside a model
    check_inputs(begun)
    for name in ("more.safetensors", "chat_template.jinja", "vocab.txt", "special_tokens_map.json"):
        (tmp_path / "model" / name).write_text("{}")
        with pytest.raises(DataError, match=f"{name} is new"):
            check_inputs(begun)
        (tmp_path / "model" / name).unlink()
    part = tmp_path / "part"
    (part / "__pycache__").mkdir(parents=True)
    (part / "a.py").write_text("")
    before = {name: inputs._stamp(file) for name, file in inputs._files(part).items()}
    (part / "__pycache__" / "a.pyc").write_text("")
    assert list(before) == ["a.py"] and not list(inputs._changes(part, before))


def test_the_sandbox_is_no_input(begun, tmp_path):
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    sandbox = begun.reward.sandbox.model_copy(update={"libraries": (libraries,)})
    config = begun.model_copy(update={"reward": begun.reward.model_copy(update={"sandbox": sandbox})})
    assert not [key for key, _ in inputs._inputs(config) if "sandbox" in key]


@pytest.mark.heavy
def test_a_start_asks_before_it_builds_anything(begun, tmp_path):
    from r1mega.stages.runtime import Runtime

    replace_byte(tmp_path / "q.jsonl")
    with pytest.raises(DataError, match="not what this run began with"), Runtime.open(begun):
        raise AssertionError("the run went on")


def test_weights_of_another_training(begun, tmp_path):
    path = tmp_path / "judge" / "model.safetensors"
    os.utime(path)
    check_inputs(begun)
    path.write_bytes(os.urandom(6 << 20))
    with pytest.raises(DataError, match=r"reward\.helpfulness\.model: .*model\.safetensors has another content"):
        check_inputs(begun)
    path.rename(path.with_name("other.safetensors"))
    with pytest.raises(DataError, match=r"model\.safetensors is gone") as raised:
        check_inputs(begun)
    assert "other.safetensors is new" in str(raised.value)


def test_what_may_change(begun, tmp_path):
    replace_byte(tmp_path / "e.jsonl")  # evaluate.data, and the outputs of the run itself
    (begun.run_dir / "metrics.jsonl").write_text("")
    replace_byte(tmp_path / "p.jsonl")  # nothing was made of it yet
    check_inputs(begun)
    record_inputs(begun)
    (begun.run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    check_inputs(begun)
    shutil.rmtree(tmp_path / "judge")  # others say that it is missing, where it is needed
    check_inputs(begun)


def test_checkpoints_of_another_model_are_told_by_their_manifests(begun):
    """Of every rank's start: their files are not looked at."""
    manifest = begun.run_dir / "checkpoints" / "step_000001" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("damaged")
    check_run_directory(begun)
    record = {"architecture": {"hidden_size": 9}, "files": {"gone.distcp": {"bytes": 3, "sha256": "0"}}}
    manifest.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="hidden_size 9 there, 8 here"):
        check_run_directory(begun)


def test_a_damaged_record(begun):
    (begun.run_dir / "inputs.json").write_text('{"data.prompts[0]": 3}')
    with pytest.raises(DataError, match=r"inputs\.json: damaged"):
        check_inputs(begun)
