"""Saving and finding checkpoints of small sharded states: in the background, killed, on a full disk, misfitting."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from r1mega import platform

pytestmark = pytest.mark.heavy

platform.prepare()

from megatron.core.dist_checkpointing import ShardedTensor  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedObject  # noqa: E402

from r1mega.checkpoint import store as store_module  # noqa: E402
from r1mega.checkpoint.manifest import PassingDigests, read_manifest, write_manifest  # noqa: E402
from r1mega.checkpoint.store import CheckpointStore, load_weights  # noqa: E402
from r1mega.errors import CheckpointError  # noqa: E402
from r1mega.platform import groups  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def one_process():
    groups.init_distributed()
    yield
    groups.destroy()


def open_store(run: Path, **changes) -> CheckpointStore:
    return CheckpointStore(run, keep=2, architecture={"hidden_size": 4}, **changes)


def state_of(tensor: torch.Tensor, key: str = "w") -> dict:
    return {"model": {"w": ShardedTensor.from_rank_offsets(key, tensor)}, "lr": 0.5}


def load(store: CheckpointStore, path: Path, like: torch.Tensor) -> torch.Tensor:
    return store.load(path, state_of(torch.zeros_like(like)))[0]["model"]["w"]


def test_a_background_save_holds_what_was_there_when_it_was_asked_for(tmp_path, monkeypatch):
    go_on, real = threading.Event(), store_module.write_pieces
    monkeypatch.setattr(store_module, "write_pieces", lambda *a: (go_on.wait(30), real(*a))[1])
    store = open_store(tmp_path, asynchronous=True)
    tensor = torch.arange(6.0)
    path = store.save(1, state_of(tensor), {"cursor": 3})
    tensor.add_(100)  # training goes on
    assert not path.exists(), "it waits for the disk, the caller does not"
    go_on.set()
    assert store.background_seconds == 0.0
    store.wait()
    assert store.background_seconds > 0
    assert store.latest() == path
    assert torch.equal(load(store, path, tensor), torch.arange(6.0))
    state, progress = store.load(path, state_of(torch.zeros(6)))
    assert (state["lr"], progress) == (0.5, {"step": 1, "cursor": 3})


def test_errors_of_a_background_save_are_raised_by_the_next_call(tmp_path, monkeypatch):
    store = open_store(tmp_path, asynchronous=True)
    first = store.save(1, state_of(torch.ones(3)), {})
    store.wait()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "write_pieces", full)
        store.save(2, state_of(torch.ones(3)), {})
        with pytest.raises(CheckpointError, match="No space left"):
            store.wait()
    assert [p.name for p in store.directory.iterdir()] == [first.name]
    store.save(3, state_of(torch.ones(3)), {})
    assert store.latest().name == "step_000003"


def test_a_disk_that_is_full_is_told_as_that(tmp_path):
    """Files may have so many bytes and no more: the data file, and with more of them the state beside it, does not fit."""
    store = open_store(tmp_path)
    first = store.save(1, state_of(torch.ones(3)), {})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room, state in (
        (4096, state_of(torch.ones(10_000))),
        (20_000, state_of(torch.ones(3)) | {"big": "x" * 50_000}),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            with pytest.raises(
                CheckpointError, match=r"step_000002\.tmp: could not be written .*File too large"
            ) as raised:
                store.save(2, state, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert "free some disk and start again" in str(raised.value)
        assert [p.name for p in store.directory.iterdir()] == [first.name]
    assert store.save(2, state_of(torch.ones(10_000)), {}).is_dir(), "there is room again"


KILLED = """
import sys, time, torch
from pathlib import Path
from r1mega import platform
platform.prepare()
from megatron.core.dist_checkpointing import ShardedTensor
from r1mega.checkpoint import store as module
from r1mega.platform import groups
groups.init_distributed()
store = module.CheckpointStore(Path(sys.argv[1]), keep=2, architecture={"hidden_size": 4}, asynchronous=True)
state = lambda value: {"model": {"w": ShardedTensor.from_rank_offsets("w", torch.full((1000,), value))}}
store.save(1, state(1.0), {})
store.wait()
real = getattr(module, sys.argv[2])
def stop(*arguments):
    real(*arguments)
    print("now", flush=True)
    time.sleep(60)
setattr(module, sys.argv[2], stop)
store.save(2, state(2.0), {})
store.wait()
"""


@pytest.mark.parametrize("after", ["write_pieces", "write_index", "write_manifest"])
def test_a_kill_at_any_moment_of_a_background_save_leaves_the_one_before(tmp_path, after):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), after], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "now\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    store = open_store(tmp_path)
    assert (store.directory / "step_000002.tmp").exists()
    path = store.latest()
    assert path.name == "step_000001"
    assert torch.equal(load(store, path, torch.zeros(1000)), torch.ones(1000))
    assert [p.name for p in store.directory.iterdir()] == ["step_000001"]


def test_a_torn_checkpoint_is_skipped_by_name_and_not_loaded(tmp_path, caplog):
    store = open_store(tmp_path)
    first, second = (store.save(i, state_of(torch.full((9,), float(i))), {}) for i in (1, 2))
    os.truncate(next(second.glob("*.distcp")), 10)
    assert store.latest() == first
    assert f"{second} is not whole" in caplog.text
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        load_weights(second, [])
    assert [p.name for p in sorted(store.directory.iterdir())] == ["step_000001", "step_000002.damaged"]


def flip(path: Path) -> None:
    """One byte of the data, the size as before."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_when_none_is_whole_nothing_is_touched_and_the_advice_works(tmp_path):
    store = open_store(tmp_path)
    for step in (1, 2):
        flip(next(store.save(step, state_of(torch.ones(9)), {}).glob("*.distcp")))
    copy = shutil.copytree(store.directory, tmp_path / "copy")
    for _ in range(2):  # a second start meets the same
        with pytest.raises(CheckpointError, match="no checkpoint of this run is whole") as raised:
            open_store(tmp_path).latest()
        assert "step_000001: " in str(raised.value) and "step_000002: " in str(raised.value)
        assert sorted(p.name for p in store.directory.iterdir()) == ["step_000001", "step_000002"]
    flip(next((store.directory / "step_000001").glob("*.distcp")))  # "put a whole one there"
    assert open_store(tmp_path).latest().name == "step_000001"
    assert (store.directory / "step_000002.damaged").is_dir()
    shutil.rmtree(store.directory)  # "remove this directory to begin anew"
    assert open_store(tmp_path).latest() is None
    assert copy.is_dir()


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_checkpoints_do_not_count_among_those_that_are_kept(tmp_path, keep):
    """Whatever the steps of damaged ones are, the newest stays, and `keep` whole ones with it."""
    store = CheckpointStore(tmp_path, keep=2, architecture={"hidden_size": 4})
    for step in (2, 4):
        store.save(step, state_of(torch.ones(9)), {})
    flip(next((store.directory / "step_000004").glob("*.distcp")))
    store = CheckpointStore(tmp_path, keep=keep, architecture={"hidden_size": 4})
    assert store.latest().name == "step_000002"
    (store.directory / "step_000009").mkdir()  # with a higher step than all that follow, and damaged meanwhile
    assert store.save(3, state_of(torch.ones(9)), {}).is_dir()
    left = sorted(p.name for p in store.directory.iterdir())
    whole = ["step_000002", "step_000003"][-keep:]
    assert left == sorted([*whole, "step_000004.damaged", "step_000009.damaged"])
    assert store.latest().name == "step_000003"


@pytest.mark.parametrize("keep", [1, 2, 3, 5, 10])
def test_as_many_stay_as_are_to_be_kept(tmp_path, keep):
    store = CheckpointStore(tmp_path, keep=keep, architecture={"hidden_size": 4})
    for step in range(1, 13):
        store.save(step, state_of(torch.ones(9)), {})
        left = sorted(p.name for p in store.directory.iterdir())
        assert left == [f"step_{i:06d}" for i in range(max(1, step + 1 - keep), step + 1)]


def test_what_was_set_aside_stays(tmp_path):
    store = open_store(tmp_path)
    for _ in range(3):
        for step in (1, 2):
            store.save(step, state_of(torch.ones(9)), {})
        flip(next((store.directory / "step_000002").glob("*.distcp")))
        assert store.latest().name == "step_000001"
    names = ["step_000001", "step_000002.damaged", "step_000002.damaged.2", "step_000002.damaged.3"]
    assert sorted(p.name for p in store.directory.iterdir()) == names


def test_a_fault_of_pruning_is_told_and_the_save_is_kept(tmp_path, caplog, monkeypatch):
    store = open_store(tmp_path)
    store.save(1, state_of(torch.ones(9)), {})
    (store.directory / "step_000001" / "manifest.json").unlink()
    with monkeypatch.context() as patched:

        def refused(path, target):
            raise OSError(16, "Device or resource busy")

        patched.setattr(Path, "rename", refused)
        path = store.save(2, state_of(torch.ones(9)), {})
    assert "older checkpoints were not all removed ([Errno 16] Device or resource busy)" in caplog.text
    assert store.latest() == path
    store.save(3, state_of(torch.ones(9)), {})
    names = ["step_000001.damaged", "step_000002", "step_000003"]
    assert sorted(p.name for p in store.directory.iterdir()) == names


@pytest.mark.parametrize("manifest", [
    "", "[]", '{"files": {}}', '{"architecture": {}, "files": []}', '{"architecture": [], "files": {}}',
    '{"architecture": {}, "files": {"common.pt": {}}}', '{"architecture": {}, "files": {"common.pt": {"bytes": 3}}}',
    '{"architecture": {}, "files": {"common.pt": {"bytes": "3", "sha256": null}}}', b"\xff\xfe", None,
])  # fmt: skip
def test_a_damaged_manifest_is_a_damaged_checkpoint(tmp_path, caplog, manifest):
    store = open_store(tmp_path)
    first, second = (store.save(i, state_of(torch.full((9,), float(i))), {}) for i in (1, 2))
    path = second / "manifest.json"
    path.unlink()
    if manifest is not None:
        path.write_bytes(manifest if isinstance(manifest, bytes) else manifest.encode())
    assert store.latest() == first
    assert f"{second} is not whole" in caplog.text and "manifest.json" in caplog.text


def test_no_bit_of_a_manifest_can_be_another_one_unseen(tmp_path):
    write_manifest(tmp_path, {"vocab_size": 448, "tied": None}, {"common.pt": {"bytes": 3, "sha256": "ab" * 32}})
    path, whole = tmp_path / "manifest.json", read_manifest(tmp_path)
    content = path.read_bytes()
    seen = 0
    for place, bit in itertools.product(range(len(content)), range(8)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        try:
            read = read_manifest(tmp_path)
        except CheckpointError:
            seen += 1
        else:
            assert all(read[name] == whole[name] for name in whole), (
                place,
                bit,
            )  # white space, or the name of its own digest
    assert seen > 7 * len(content)
    written = json.loads(content)
    del written["sha256"]  # as before there was one
    path.write_text(json.dumps(written))
    assert read_manifest(tmp_path) == whole


def test_digests_of_a_newer_program_stop_the_start(tmp_path):
    """Its checkpoint is not damaged, and stays where it is."""
    store = open_store(tmp_path)
    first, second = (store.save(i, state_of(torch.full((9,), float(i))), {}) for i in (1, 2))
    manifest = read_manifest(second)
    records = {name: {"bytes": r["bytes"], "blake9": "ab"} for name, r in manifest["files"].items()}
    write_manifest(second, manifest["architecture"], records)
    with pytest.raises(
        CheckpointError, match=r"digests by blake9, of a newer program than this one, .*; nothing was moved"
    ):
        store.latest()
    assert sorted(store.directory.iterdir()) == [first, second]


@pytest.mark.parametrize("name", ["__0_0.distcp", "manifest.json"])
def test_a_file_that_the_disk_does_not_read_stops_the_start(tmp_path, monkeypatch, name):
    store = open_store(tmp_path)
    first, second = (store.save(i, state_of(torch.full((9,), float(i))), {}) for i in (1, 2))
    real = Path.open

    def broken(path, *arguments, **options):
        if path == second / name:
            raise OSError(5, "Input/output error")
        return real(path, *arguments, **options)

    assert (second / name).is_file()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", broken)
        with pytest.raises(
            CheckpointError, match=r"cannot be read \(\[Errno 5\] Input/output error\); nothing was moved"
        ):
            store.latest()
    assert store.latest() == second  # "once it can be read"
    second.rename(second.with_name(second.name + ".damaged"))  # "to go on from the checkpoint before it"
    assert store.latest() == first


def test_everything_that_a_checkpoint_lacks_is_listed(tmp_path):
    store = open_store(tmp_path)
    path = store.save(1, {"a": ShardedTensor.from_rank_offsets("a", torch.ones(2, 3))}, {})
    template = {
        "a": ShardedTensor.from_rank_offsets("a", torch.ones(3, 3)),
        "b": ShardedTensor.from_rank_offsets("b", torch.ones(1)),
        "c": [ShardedTensor.from_rank_offsets("c", torch.ones(1))],
    }
    with pytest.raises(CheckpointError) as caught:
        store.load(path, template)
    for line in ("3 problems", "shape: a is [2, 3], the model wants [3, 3]", "missing: b", "missing: c"):
        assert line in str(caught.value)


def test_norms_are_found_under_the_name_of_the_other_kind_of_layers(tmp_path):
    """Saved by layers with norms of their own, loaded by Transformer Engine's; extra states are None."""
    store, start = open_store(tmp_path), "decoder.layers.3."
    saved = {n: torch.randn(4) for n in ("pre_mlp_layernorm.weight", "self_attention.q_layernorm.weight")}
    path = store.save(1, {n: ShardedTensor.from_rank_offsets(start + n, t) for n, t in saved.items()}, {})
    fused = ("mlp.linear_fc1.layer_norm_weight", "self_attention.linear_q_up_proj.layer_norm_weight")
    template = {n: ShardedTensor.from_rank_offsets(start + n, torch.zeros(4)) for n in fused}
    template["mlp._extra_state"] = ShardedObject(f"{start}mlp._extra_state", None, (1,), (0,))
    state, _ = store.load(path, template)
    assert all(torch.equal(state[n], t) for n, t in zip(fused, saved.values(), strict=True))
    assert state["mlp._extra_state"] is None


def test_the_manifest_is_of_what_lies_there(tmp_path):
    import xxhash

    path = open_store(tmp_path).save(1, state_of(torch.randn(1 << 19)), {})  # pieces smaller and larger than a block
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert files.keys() == {p.name for p in path.iterdir()} - {"manifest.json"}
    for name, record in files.items():
        content = (path / name).read_bytes()
        assert record == {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}


def test_a_checkpoint_from_when_digests_were_sha256_is_still_proven(tmp_path, caplog):
    import hashlib

    store = open_store(tmp_path)
    first, second = (store.save(i, state_of(torch.full((9,), float(i))), {}) for i in (1, 2))
    for path in (first, second):
        manifest = json.loads((path / "manifest.json").read_text())
        contents = {name: (path / name).read_bytes() for name in manifest["files"]}
        records = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in contents.items()}
        write_manifest(path, manifest["architecture"], records)
    assert store.latest() == second
    data = second / "__0_0.distcp"
    passing = PassingDigests(second)
    assert passing.problem() is None
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    assert PassingDigests(second).problem() == "__0_0.distcp has another sha256 than when it was written"
    assert store.latest() == first
    assert "__0_0.distcp has another sha256" in caplog.text
