"""Checkpoints as people have them: heads beside tied embeddings, weights of other and of mixed dtypes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from r1mega.checkpoint.convert import ConvertOptions, convert
from r1mega.checkpoint.to_megatron import check_weights
from r1mega.checkpoint.workers import Alone
from r1mega.errors import CheckpointError
from r1mega.evaluate.source import checkpoint_dtype, find_checkpoint

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64, "rope_theta": 1e4,
}  # fmt: skip


def state(dtype, seed=1):
    """Weights that bfloat16 does not hold, unless they are made of it."""
    generator = torch.Generator().manual_seed(seed)
    prefix = "model.layers.0."
    shapes = {
        EMBEDDING: (96, 32), "model.norm.weight": (32,), prefix + "input_layernorm.weight": (32,),
        prefix + "post_attention_layernorm.weight": (32,), prefix + "self_attn.q_proj.weight": (32, 32),
        prefix + "self_attn.k_proj.weight": (16, 32), prefix + "self_attn.v_proj.weight": (16, 32),
        prefix + "self_attn.o_proj.weight": (32, 32), prefix + "mlp.gate_proj.weight": (48, 32),
        prefix + "mlp.up_proj.weight": (48, 32), prefix + "mlp.down_proj.weight": (32, 48), HEAD: (96, 32),
    }  # fmt: skip
    return {name: (torch.randn(shape, generator=generator) * 0.05).to(dtype) for name, shape in shapes.items()}


def write(directory, tensors, **config):
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG | config))
    return directory


def there_and_back(source, tmp_path, **options):
    megatron = convert(source, tmp_path / "megatron", "megatron", ConvertOptions(**options), Alone())
    back = convert(megatron, tmp_path / "back", "hf", ConvertOptions(), Alone())
    return load_file(back / "model.safetensors"), json.loads((back / "config.json").read_text())


# -------------------------------------------- a head beside a tied embedding: vLLM#51063, transformers#42612


@pytest.mark.parametrize(
    "change",
    [
        lambda head: head + 1,
        lambda head: torch.cat([head[:-1], head[-1:] * 2]),  # one row
        lambda head: head.float() + 1e-6,  # by less than bfloat16 shows
        lambda head: head[:-8],  # another shape
        lambda head: head.T.contiguous(),
        lambda head: head[torch.arange(95, -1, -1)],
        lambda head: head * float("nan"),
    ],
)
def test_a_head_of_its_own_is_not_thrown_away(tmp_path, change):
    tensors = state(torch.bfloat16)
    tensors[HEAD] = change(tensors[EMBEDDING].clone()).contiguous()
    source = write(tmp_path / "hf", tensors, tie_word_embeddings=True, torch_dtype="bfloat16")
    message = f"{HEAD} differs from {EMBEDDING}.*tie_word_embeddings"
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "megatron", "megatron", ConvertOptions(), Alone())
    for other in (
        lambda: check_weights(source, 0),
        lambda: find_checkpoint(source),
    ):  # of a stage; of eval and generate
        with pytest.raises(CheckpointError, match=message):
            other()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize("copy", [torch.bfloat16, torch.float32, None])
def test_a_head_that_is_the_embedding_or_missing_is_tied(tmp_path, copy):
    tensors = state(torch.bfloat16)
    del tensors[HEAD]
    if copy is not None:
        tensors[HEAD] = tensors[EMBEDDING].to(copy, copy=True)
    source = write(tmp_path / "hf", tensors, tie_word_embeddings=True, torch_dtype="bfloat16")
    check_weights(source, 0)
    assert find_checkpoint(source).path == source
    back, config = there_and_back(source, tmp_path)
    assert set(back) == set(tensors) - {HEAD} and config["tie_word_embeddings"]
    assert all(torch.equal(back[name], tensors[name]) for name in back)


def test_a_copy_with_a_nan_is_the_copy(tmp_path):
    tensors = state(torch.bfloat16)
    tensors[EMBEDDING][3, 4] = float("nan")
    for name, dtype in (("same", torch.bfloat16), ("wide", torch.float32)):
        tensors[HEAD] = tensors[EMBEDDING].to(dtype, copy=True)
        assert find_checkpoint(write(tmp_path / name, tensors, tie_word_embeddings=True))


def test_what_the_advice_says_works(tmp_path):
    tensors = state(torch.bfloat16)
    source = write(tmp_path / "hf", tensors, tie_word_embeddings=False, torch_dtype="bfloat16")
    back, _ = there_and_back(source, tmp_path)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(("missing", "tied"), [(HEAD, False), (EMBEDDING, True), (EMBEDDING, False)])
def test_a_missing_embedding_or_head_is_named(tmp_path, missing, tied):
    tensors = state(torch.bfloat16)
    del tensors[missing]
    source = write(tmp_path / "hf", tensors, tie_word_embeddings=tied, torch_dtype="bfloat16")
    with pytest.raises(CheckpointError, match=f"missing: {missing}"):
        convert(source, tmp_path / "megatron", "megatron", ConvertOptions(), Alone())


# ------------------------------------------------------------------------------------------------ other dtypes


@pytest.mark.parametrize(
    ("stored", "said", "made"),
    [
        (torch.float16, {"torch_dtype": "float16"}, torch.float32),
        (torch.float16, {"dtype": "float16"}, torch.float32),
        (torch.float16, {}, torch.float32),
        (torch.float32, {"torch_dtype": "float32"}, torch.float32),
        (torch.float32, {"torch_dtype": "float16"}, torch.float32),
        (torch.float32, {}, torch.float32),
        (torch.float16, {"torch_dtype": "auto"}, torch.float32),
        (torch.bfloat16, {"torch_dtype": "bfloat16"}, torch.bfloat16),
        (torch.bfloat16, {}, torch.bfloat16),
        ((torch.bfloat16, torch.float16), {"torch_dtype": "float16"}, torch.float32),
        ((torch.bfloat16, torch.float32), {}, torch.float32),
    ],
)
def test_nothing_is_lost(tmp_path, stored, said, made, caplog):
    first, second = stored if isinstance(stored, tuple) else (stored, stored)
    tensors = {name: t.to(first if "norm" in name else second) for name, t in state(torch.float32).items()}
    back, config = there_and_back(write(tmp_path / "hf", tensors, **said), tmp_path)
    assert {tensor.dtype for tensor in back.values()} == {made}
    assert all(torch.equal(back[name].float(), tensor.float()) for name, tensor in tensors.items())
    assert config["torch_dtype"] == str(made).removeprefix("torch.") and "rounded" not in caplog.text


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_what_is_rounded_is_said(tmp_path, stored, caplog):
    """config.json asks for it, the weights have more digits."""
    tensors = state(stored)
    source = write(tmp_path / "hf", tensors, torch_dtype="bfloat16")
    back, _ = there_and_back(source, tmp_path)
    assert {tensor.dtype for tensor in back.values()} == {torch.bfloat16}
    assert "12 tensors are wider than the bfloat16 of config.json and are rounded to it" in caplog.text
    caplog.clear()
    convert(source, tmp_path / "wide", "megatron", ConvertOptions(dtype="float32"), Alone())
    convert(source, tmp_path / "asked", "megatron", ConvertOptions(dtype="bfloat16"), Alone())
    assert "rounded" not in caplog.text, "by who did not ask for it"


@pytest.mark.parametrize("stored", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("said", [{}, {"torch_dtype": "float16"}, {"dtype": "float32"}, {"dtype": "bfloat16"}])
def test_it_is_evaluated_in_what_it_is_converted_to(tmp_path, stored, said):
    source = write(tmp_path / "hf", state(stored), **said)
    _, config = there_and_back(source, tmp_path)
    assert checkpoint_dtype(source) == config["torch_dtype"]
