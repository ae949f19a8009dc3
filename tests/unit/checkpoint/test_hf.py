"""HF directories: what is written is what transformers reads; broken ones are refused by name."""

import json
import resource
import signal

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from r1mega.checkpoint.hf import HFTensors, read_config, write_hf
from r1mega.errors import CheckpointError


@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000])
def test_transformers_loads_what_was_written(tmp_path, shard_bytes):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    described = json.loads(config.to_json_string(use_diff=False)) | {"architectures": ["Qwen3ForCausalLM"]}
    write_hf(tmp_path / "hf", model.state_dict().items(), described, shard_bytes=shard_bytes)
    shards = list((tmp_path / "hf").glob("*.safetensors"))
    assert (len(shards) == 1) == (shard_bytes == 1 << 30)
    assert all(shard.stat().st_size <= shard_bytes + 4096 for shard in shards)  # the header comes on top
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    read = HFTensors(tmp_path / "hf")
    assert set(read) == set(model.state_dict())
    assert all(torch.equal(read[name], value) for name, value in model.state_dict().items())


def test_a_failed_write_keeps_the_old_directory(tmp_path):
    write_hf(tmp_path / "hf", [("a", torch.ones(2))], {"x": 1})

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # the disk takes no more
    try:
        with pytest.raises(CheckpointError, match="File too large.*nothing of it was kept"):
            write_hf(tmp_path / "hf", [("a", torch.zeros(200))], {"x": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert torch.equal(HFTensors(tmp_path / "hf")["a"], torch.ones(2))
    assert read_config(tmp_path / "hf") == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_truncated_file_is_named(tmp_path):
    save_file({"a": torch.ones(1000)}, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*truncated"):
        HFTensors(tmp_path)


def test_headers_whose_tensors_do_not_tile_the_file_are_refused(tmp_path):
    """What the safetensors library refuses too."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4), "b": torch.zeros(4)}, path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    damages = {
        "a tensor over another": content[: 8 + length].replace(b"[16,32]", b"[ 0,16]") + content[8 + length :],
        "a byte too many": content + b"\0",
    }
    for damaged in damages.values():
        path.write_bytes(damaged)
        with pytest.raises(SafetensorError):
            load_file(path)
        with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
            HFTensors(tmp_path)


def test_tensors_in_two_files_are_all_listed(tmp_path):
    """A directory into which two models were downloaded."""
    save_file({"a": torch.ones(4), "b": torch.zeros(4)}, tmp_path / "model.safetensors")
    save_file({"b": torch.ones(4), "a": torch.zeros(4)}, tmp_path / "pytorch.safetensors")
    with pytest.raises(CheckpointError, match="2 tensors are in two files") as error:
        HFTensors(tmp_path)
    assert "b: model.safetensors, pytorch.safetensors" in str(error.value)


@pytest.mark.parametrize(("content", "message"), [(None, "no such file"), ("{", "not JSON")])
def test_bad_config(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


def test_no_weights(tmp_path):
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        HFTensors(tmp_path)
