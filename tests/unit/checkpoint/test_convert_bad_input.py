"""What a conversion refuses, and that nothing half-written is left under the final name."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from r1mega.checkpoint import safetensors_file
from r1mega.checkpoint.convert import convert, parse_bytes, parse_parallel
from r1mega.checkpoint.workers import Alone
from r1mega.config.schema import ParallelConfig
from r1mega.errors import CheckpointError, ConfigError
from tests.checkpoints import FAMILIES, MTP, hub_state, write_hub_directory
from tests.unit.checkpoint.test_convert import LLAMA, options

pytestmark = pytest.mark.heavy


def test_everything_that_is_wrong_with_the_tensors_is_listed(tmp_path):
    state = hub_state(LLAMA)
    del state["model.norm.weight"], state["model.layers.2.mlp.up_proj.weight"]
    state["model.layers.0.self_attn.o_proj.weight"] = torch.zeros(3, 3, dtype=torch.bfloat16)
    state["model.layers.1.mlp.surprise.weight"] = torch.zeros(1)
    state["model.layers.1.mlp.down_proj.weight"] = torch.zeros(64, 128, dtype=torch.int8)
    state["model.layers.3.mlp.down_proj.weight"] = torch.zeros(64, 128).to(torch.float8_e4m3fn)
    source = write_hub_directory(tmp_path / "hf", LLAMA, state)
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "out", "megatron", options(), Alone())
    for line in (
        "6 tensors",
        "missing: model.norm.weight",
        "missing: model.layers.2.mlp.up_proj.weight",
        "shape: model.layers.0.self_attn.o_proj.weight is [3, 3], config.json asks for [64, 64]",
        "unknown: model.layers.1.mlp.surprise.weight",
        "dtype: model.layers.1.mlp.down_proj.weight is torch.int8",
        "dtype: model.layers.3.mlp.down_proj.weight is torch.float8_e4m3fn without",
    ):
        assert line in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_a_config_of_another_model_is_refused_on_the_way_back(tmp_path):
    source = write_hub_directory(tmp_path / "hf", LLAMA, hub_state(LLAMA))
    megatron = convert(source, tmp_path / "megatron", "megatron", options(), Alone())
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(LLAMA | {"intermediate_size": 256}))
    with pytest.raises(CheckpointError, match="intermediate_size 128 there, 256 here"):
        convert(megatron, tmp_path / "out", "hf", options(config=other), Alone())


def test_mtp_copies_that_differ_from_what_they_copy_are_not_lost_silently(tmp_path):
    state = hub_state(MTP)
    state["model.layers.4.shared_head.head.weight"][50, 3] += 1
    source = write_hub_directory(tmp_path / "hf", MTP, state)
    with pytest.raises(CheckpointError, match=r"layers\.4\.shared_head\.head\.weight differs from lm_head\.weight"):
        convert(source, tmp_path / "out", "megatron", options(), Alone())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[: len(content) // 2], "truncated"),
        (lambda content: content[:5], "truncated"),
        (lambda content: b"\xff" * 8 + content[8:], "truncated or not a safetensors file"),
        (lambda content: content[:8] + b"!" + content[9:], "truncated or not a safetensors file"),
        (None, "lacks model-00002-of-00003.safetensors"),
    ],
)
def test_damaged_and_missing_shards_are_named(tmp_path, damage, message):
    source = write_hub_directory(tmp_path / "hf", LLAMA, hub_state(LLAMA))
    shard = source / "model-00002-of-00003.safetensors"
    if damage is None:
        shard.unlink()
    else:
        shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(source, tmp_path / "out", "megatron", options(), Alone())
    assert shard.name in str(caught.value)


def test_a_file_that_is_cut_while_it_is_read_is_an_error_not_a_signal(tmp_path, monkeypatch):
    source = write_hub_directory(tmp_path / "hf", LLAMA, hub_state(LLAMA))
    real = safetensors_file.read_header

    def read_then_cut(path):
        header = real(path)
        os.truncate(path, path.stat().st_size // 2)
        return header

    monkeypatch.setattr("r1mega.checkpoint.hf.read_header", read_then_cut)
    with pytest.raises(CheckpointError, match="bytes too early"):
        convert(source, tmp_path / "out", "megatron", options(), Alone())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["flip", "cut", "remove"])
def test_a_torn_or_altered_checkpoint_is_refused(tmp_path, change):
    source = write_hub_directory(tmp_path / "hf", LLAMA, hub_state(LLAMA))
    megatron = convert(source, tmp_path / "megatron", "megatron", options(), Alone())
    victim = megatron / "__1_0.distcp"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    changes = {"flip": lambda: victim.write_bytes(content), "cut": lambda: os.truncate(victim, 99)}
    changes.get(change, victim.unlink)()
    with pytest.raises(CheckpointError, match=r"not a whole checkpoint \(__1_0\.distcp"):
        convert(megatron, tmp_path / "out", "hf", options(), Alone())
    assert not (tmp_path / "out").exists()


FULL = """
import resource, sys
from pathlib import Path
from r1mega.checkpoint.convert import ConvertOptions, convert
from r1mega.checkpoint.workers import Alone
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # as a disk that takes no more
from r1mega.errors import CheckpointError
try:
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], ConvertOptions(max_file_bytes=60_000), Alone())
except CheckpointError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("target", ["megatron", "hf"])
def test_a_full_disk_leaves_nothing_under_the_final_name(tmp_path, target):
    source = write_hub_directory(tmp_path / "hf", LLAMA, hub_state(LLAMA))
    if target == "hf":
        source = convert(source, tmp_path / "megatron", "megatron", options(), Alone())
    done = subprocess.run([sys.executable, "-c", FULL, str(source), str(tmp_path / "out"), target],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == CheckpointError.exit_code, done.stderr
    assert "out was not made" in done.stdout
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial").glob("*.tmp"))
    convert(source, tmp_path / "out", target, options(), Alone())  # with space again, the same call makes it
    assert (tmp_path / "out").exists()


def test_a_disk_that_fills_up_at_the_very_end_is_no_traceback(tmp_path, monkeypatch):
    """torch.save makes a RuntimeError of it."""
    source = write_hub_directory(tmp_path / "hf", LLAMA, hub_state(LLAMA))

    real = torch.save

    def full(content, file):
        if str(file).endswith("common.pt"):
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        real(content, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(CheckpointError, match="file write failed; .*out was not made"):
            convert(source, tmp_path / "out", "megatron", options(), Alone())
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out", "megatron", options(), Alone())
    assert (tmp_path / "out").exists()


@pytest.mark.parametrize("verify", [True, False])
def test_what_is_no_checkpoint_is_said(tmp_path, verify):
    empty = tmp_path / "empty"
    empty.mkdir()
    for path in (tmp_path / "nowhere", empty):
        with pytest.raises(CheckpointError, match=f"{path.name} is neither a run nor a whole checkpoint"):
            convert(path, tmp_path / "out", "hf", options(verify=verify), Alone())
        with pytest.raises(CheckpointError, match=f"{path.name}/config.json: no such file"):
            convert(path, tmp_path / "out", "megatron", options(), Alone())
    (empty / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="a JSON list, not the config of a model"):
        convert(empty, tmp_path / "out", "megatron", options(), Alone())


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_named(tmp_path, index):
    source = write_hub_directory(tmp_path / "hf", LLAMA, hub_state(LLAMA))
    (source / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="index.json: not an index of shards"):
        convert(source, tmp_path / "out", "megatron", options(), Alone())


def test_layouts_that_do_not_divide(tmp_path):
    source = write_hub_directory(tmp_path / "hf", LLAMA, hub_state(LLAMA))
    with pytest.raises(ConfigError, match="tp = 3 does not divide the model's num_attention_heads = 4"):
        convert(source, tmp_path / "out", "megatron", options(parallel=ParallelConfig(tp=3)), Alone())
    moe = write_hub_directory(tmp_path / "moe", FAMILIES["deepseek_v3"], hub_state(FAMILIES["deepseek_v3"]))
    with pytest.raises(ConfigError, match="ep = 3 does not divide the model's n_routed_experts = 8"):
        convert(moe, tmp_path / "out", "megatron", options(parallel=ParallelConfig(ep=3)), Alone())


def test_an_existing_result_is_not_overwritten(tmp_path):
    source = write_hub_directory(tmp_path / "hf", LLAMA, hub_state(LLAMA))
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists; remove it"):
        convert(source, tmp_path / "out", "megatron", options(), Alone())


@pytest.mark.parametrize("text", ["tp", "tp=0", "pp=0", "dp=2", "tp=two", "tp=2;ep=2"])
def test_bad_layouts_on_the_command_line(text):
    with pytest.raises(ConfigError, match="--parallel"):
        parse_parallel(text)


def test_sizes_on_the_command_line():
    assert [parse_bytes(t) for t in ("5GB", "512MiB", "17", "2 kb")] == [5 * 10**9, 512 << 20, 17, 2000]
    for text in ("5XB", "", "GB", "-1", "0"):
        with pytest.raises(ConfigError, match="--max-shard-size"):
            parse_bytes(text)
