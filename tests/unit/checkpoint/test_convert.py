"""Conversions: bits, what transformers makes of the result, FP8 blocks, resuming, bounded memory, many processes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from r1mega.checkpoint import conversion, safetensors_file, to_hf
from r1mega.checkpoint.convert import ConvertOptions, convert, parse_parallel
from r1mega.checkpoint.hf import HFTensors, read_config
from r1mega.checkpoint.parameters import parameters
from r1mega.checkpoint.safetensors_file import write_tensors
from r1mega.checkpoint.workers import Alone
from r1mega.config.layout import num_experts
from r1mega.config.schema import ParallelConfig
from r1mega.errors import CheckpointError, ConfigError
from r1mega.model.hf_config import transformers_config
from tests.checkpoints import FAMILIES, MTP, hub_state, write_hub_directory
from tests.reference import DENSE, make_hf_model

pytestmark = pytest.mark.heavy

SMALL = 60_000  # bytes a file, so that there are several
LLAMA = FAMILIES["llama"]


def options(**changes) -> ConvertOptions:
    return ConvertOptions(**({"max_file_bytes": SMALL} | changes))


def there_and_back(source: Path, base: Path, parallel: str = "", **back) -> Path:
    megatron = convert(source, base / "megatron", "megatron", options(parallel=parse_parallel(parallel)), Alone())
    return convert(megatron, base / "back", "hf", options(**back), Alone())


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_bit_exact_and_transformers_computes_the_same(tmp_path, family):
    """Cut for TP 2 (and expert layouts), back, loaded by transformers in float32: the logits of the originals."""
    from transformers import AutoModelForCausalLM

    config, experts = FAMILIES[family], num_experts(FAMILIES[family])
    state = hub_state(config)
    source = write_hub_directory(tmp_path / "hf", config, state)
    back = there_and_back(source, tmp_path, "tp=2,ep=2,etp=2" if experts else "tp=2")
    tensors = {}
    for file in back.glob("*.safetensors"):  # by the library, as transformers and vLLM read them
        assert file.stat().st_size <= SMALL + 8192 or len(load_file(file)) <= 2, "larger only for one parameter"
        tensors |= load_file(file)
    assert tensors.keys() == state.keys()
    for name, tensor in state.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name], tensor), name
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == state.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    assert (back / "tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()
    loaded, report = AutoModelForCausalLM.from_pretrained(
        back,
        config=transformers_config(back),
        dtype=torch.float32,
        output_loading_info=True,
        attn_implementation="eager",
    )
    assert not report["missing_keys"]
    assert read_config(back)["model_type"] == config["model_type"]
    reference = make_hf_model(config)
    with torch.no_grad():
        for parameter in reference.parameters():  # the routers' bias, a buffer, is stored in float32
            parameter.copy_(parameter.bfloat16())
        tokens = torch.arange(40).view(2, 20) % config["vocab_size"]
        torch.testing.assert_close(loaded(tokens).logits, reference.eval()(tokens).logits, rtol=0, atol=1e-5)


def test_fp8_blocks_are_read_as_the_published_checkpoint_defines_them(tmp_path):
    """weight = fp8 * scale of its 128 x 128 block, rounded to bfloat16 once: here in float64, block by block."""
    config = MTP | {"hidden_size": 192, "intermediate_size": 300, "num_hidden_layers": 2}
    state = hub_state(config)
    stored, expected = quantized_by_hand(state)
    source = write_hub_directory(tmp_path / "hf", config | {"quantization_config": QUANTIZATION}, stored)
    back = there_and_back(source, tmp_path, "tp=2")
    tensors = HFTensors(back)
    assert set(tensors) == set(expected)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    assert "quantization_config" not in read_config(back)
    direct = HFTensors(source)  # what a stage reads that starts from the published form
    assert set(direct) == set(expected)
    assert all(torch.equal(direct[name], tensor) for name, tensor in expected.items())
    for name, tensor in expected.items():  # what a rank of a generator reads of it: up to three blocks of rows
        for first, last in ((0, 1), (len(tensor) // 3, 2 * len(tensor) // 3), (len(tensor) - 1, len(tensor))):
            assert torch.equal(direct.rows(name, first, last), tensor[first:last]), name


def test_fp8_blocks_are_written_as_they_are_read(tmp_path):
    """Every weight within half a step of e4m3 of its block's scale; names, scales and config of the published form."""
    config = MTP | {"hidden_size": 192, "intermediate_size": 300, "num_hidden_layers": 2}
    state = hub_state(config)
    source = write_hub_directory(tmp_path / "hf", config, state)
    back = there_and_back(source, tmp_path, fp8_blocks=True)
    raw = {name: tensor for file in back.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert read_config(back)["quantization_config"] == QUANTIZATION
    quantized = {name for name, tensor in raw.items() if tensor.dtype == torch.float8_e4m3fn}
    assert quantized == {n for n in state if n.endswith("_proj.weight") and "eh_proj" not in n} | {
        n for n in state if n.endswith("kv_a_proj_with_mqa.weight")
    }
    assert {n for n in raw if n.endswith("_scale_inv")} == {f"{n}_scale_inv" for n in quantized}
    for name, tensor in state.items():
        if name not in quantized:
            assert torch.equal(raw[name], tensor), name
            continue
        scale = raw[f"{name}_scale_inv"].double()
        wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: tensor.shape[0], : tensor.shape[1]]
        error = (raw[name].double() * wide - tensor.double()).abs()
        step = (tensor.double().abs() / 16).clamp(min=2**-10 * 1.0001 * wide.max())  # 3 bits of mantissa; subnormals
        assert (error <= step).all(), name
        largest = tensor.double().abs().max() / wide.max()
        assert 440 <= largest <= 449, "the range of e4m3 is used"


def test_the_plan_of_deepseek_v3_has_its_published_size():
    """671B parameters, 14B more with the MTP module, whose own embedding and head count (README of DeepSeek-V3)."""
    config = read_config(Path(__file__).parents[3] / "configs" / "deepseek_v3_671b" / "model")
    sizes = {p.entry.hf_names: torch.Size(p.shape).numel() for p in parameters(config, num_mtp_layers=1)}
    mtp = sum(size for names, size in sizes.items() if names[0].startswith("model.layers.61."))
    assert round((sum(sizes.values()) - mtp) / 1e9) == 671
    copies = sizes[("model.embed_tokens.weight",)] + sizes[("lm_head.weight",)]
    assert round((sum(sizes.values()) + copies) / 1e9, 1) == 684.5
    assert 13 < (mtp + copies) / 1e9 < 14


QUANTIZATION = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


def quantized_by_hand(state):
    """(tensors as published: every linear weight in random FP8 with random scales, what they stand for in bfloat16)."""
    stored, expected = {}, dict(state)
    generator = torch.Generator().manual_seed(3)
    for name, tensor in state.items():
        if not name.endswith(("_proj.weight", "with_mqa.weight")) or "eh_proj" in name:
            stored[name] = tensor
            continue
        rows, columns = tensor.shape
        fp8 = torch.randn(tensor.shape, generator=generator).mul(100).clamp(-448, 448).to(torch.float8_e4m3fn)
        scales = torch.rand(-(-rows // 128), -(-columns // 128), generator=generator) * 1e-3
        values = torch.empty(tensor.shape, dtype=torch.float64)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                block = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
                values[block] = fp8[block].double() * scales[i, j].double()
        stored[name], stored[f"{name}_scale_inv"] = fp8, scales
        expected[name] = values.float().bfloat16()
    return stored, expected


# ---------------------------------------------------------------------- resuming, memory, many processes


@pytest.mark.parametrize("target", ["megatron", "hf"])
def test_an_interrupted_conversion_goes_on_at_the_file(tmp_path, monkeypatch, target):
    source = write_hub_directory(tmp_path / "hf", LLAMA, hub_state(LLAMA))
    if target == "hf":
        source = convert(source, tmp_path / "megatron", "megatron", options(), Alone())
    whole = convert(source, tmp_path / "whole", target, options(), Alone())
    written, real = [], conversion._write_one

    def stop_after_three(job, file, partial):
        if len(written) == 3:
            raise KeyboardInterrupt
        real(job, file, partial)
        written.append(file.name)

    monkeypatch.setattr(conversion, "_write_one", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", target, options(), Alone())
    assert not (tmp_path / "out").exists()
    first = list(written)
    (tmp_path / "out.partial" / f"{first[0]}.tmp").write_bytes(b"cut short")
    monkeypatch.setattr(conversion, "_write_one", lambda *a: (real(*a), written.append(a[1].name)))
    out = convert(source, tmp_path / "out", target, options(), Alone())
    assert len(written) == len(set(written)) > 3, "no file is written twice"
    names = sorted(p.name for p in whole.iterdir())
    assert sorted(p.name for p in out.iterdir()) == names
    assert all((out / n).read_bytes() == (whole / n).read_bytes() for n in names if n != "manifest.json")


def test_what_was_left_of_another_conversion_is_not_used(tmp_path, monkeypatch):
    source = write_hub_directory(tmp_path / "hf", LLAMA, hub_state(LLAMA))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_final_name(os.replace))
        with pytest.raises(CheckpointError):
            convert(source, tmp_path / "out", "megatron", options(), Alone())
    other = hub_state(LLAMA, seed=1)
    shutil.rmtree(source)
    write_hub_directory(source, LLAMA, other)
    megatron = convert(source, tmp_path / "out", "megatron", options(), Alone())
    back = HFTensors(convert(megatron, tmp_path / "back", "hf", options(), Alone()))
    assert all(torch.equal(back[name], tensor) for name, tensor in other.items())


def no_final_name(real):
    def replace(source, target):
        if str(target).endswith("out"):
            raise OSError(28, "No space left on device")
        real(source, target)

    return replace


MEASURE = """
import sys, torch
from pathlib import Path
from r1mega.checkpoint.convert import ConvertOptions, convert
from r1mega.checkpoint.safetensors_file import write_tensors
from r1mega.checkpoint.workers import Alone
source, out, target = sys.argv[1:]
torch.set_num_threads(1)
import r1mega.checkpoint.safetensors_file, torch.distributed.checkpoint
status = lambda key: next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith(key))
moved = lambda: [int(l.split()[1]) for l in open("/proc/self/io") if l.startswith(("rchar", "wchar"))]
before, (read, written) = status("VmRSS"), moved()
convert(Path(source), Path(out), target, ConvertOptions(max_file_bytes=48 << 20), Alone())
after = moved()
# not ru_maxrss: that counts the process from before exec too
print(status("VmHWM") - before, after[0] - read, after[1] - written)
"""


def test_each_byte_passes_once_and_memory_is_bounded_by_the_largest_tensor(tmp_path):
    """A model of 340 MB, its largest tensor 33 MB, files of 48 MB: within twice the one plus the other. Digests are made and
    compared on the way: the model is read once and written once, as the kernel counts it.
    """
    config = DENSE | {
        "model_type": "llama", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 9,
        "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 16384,
    }  # fmt: skip
    shapes = {"self_attn.q_proj": (1024, 1024), "self_attn.k_proj": (1024, 1024), "self_attn.v_proj": (1024, 1024),
              "self_attn.o_proj": (1024, 1024), "mlp.gate_proj": (4096, 1024), "mlp.up_proj": (4096, 1024),
              "mlp.down_proj": (1024, 4096), "input_layernorm": (1024,), "post_attention_layernorm": (1024,)}  # fmt: skip
    state = {f"model.layers.{i}.{n}.weight": torch.full(s, 0.5, dtype=torch.bfloat16)
             for i in range(9) for n, s in shapes.items()}  # fmt: skip
    state |= {n: torch.ones(16384, 1024, dtype=torch.bfloat16) for n in ("model.embed_tokens.weight", "lm_head.weight")}
    state["model.norm.weight"] = torch.ones(1024, dtype=torch.bfloat16)
    largest, model = 16384 * 1024 * 2, sum(t.nbytes for t in state.values())
    source = write_hub_directory(tmp_path / "hf", config, state)
    bound = 2 * largest + (48 << 20)
    assert model > 2.5 * bound, "otherwise the test says nothing"
    for before, after, target in ((source, "megatron", "megatron"), (tmp_path / "megatron", "back", "hf")):
        environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
        done = subprocess.run([sys.executable, "-c", MEASURE, str(before), str(tmp_path / after), target],
                              capture_output=True, text=True, env=environment, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
        peak, read, written = map(int, done.stdout.split()[-3:])
        assert peak <= bound, f"to {target}: {peak / 1e6:.0f} MB, bound {bound / 1e6:.0f} MB"
        assert model <= read <= 1.05 * model, f"to {target}: {read / model:.3f} times the model was read"
        assert model <= written <= 1.05 * model, f"to {target}: {written / model:.3f} times the model was written"


@pytest.mark.parametrize("where", ["begin", "tensor", "end", "small", "two files"])
def test_nothing_is_kept_of_an_altered_checkpoint(tmp_path, where):
    """Found while it is read or when all was read; when it is mended, nothing that was made of it before is used."""
    source = write_hub_directory(tmp_path / "hf", LLAMA, hub_state(LLAMA))
    megatron = convert(source, tmp_path / "megatron", "megatron", options(), Alone())
    expected = convert(megatron, tmp_path / "expected", "hf", options(), Alone())
    place = {"begin": 3, "tensor": 0.5, "end": -3, "small": -2, "two files": 3}[where]
    altered = {megatron / ("config.json" if where == "small" else "__1_0.distcp"): place}
    if where == "two files":
        altered[megatron / "__0_0.distcp"] = 0.5  # into a file that is finished when the other one stops the conversion
    whole = {file: file.read_bytes() for file in altered}
    for file, at in altered.items():
        content = bytearray(whole[file])
        content[int(at * len(content)) if isinstance(at, float) else at] ^= 1
        file.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"not a whole checkpoint \(\S+ has another xxh3_128.*use another one"
    ) as told:
        convert(megatron, tmp_path / "out", "hf", options(), Alone())
    assert "goes on" not in str(told.value), "it would end in the same"
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    for file, content in whole.items():
        file.write_bytes(content)
    for name, given in (("out", {}), ("trusted", {"verify": False})):
        made = convert(megatron, tmp_path / name, "hf", options(**given), Alone())
        assert all((made / p.name).read_bytes() == p.read_bytes() for p in expected.iterdir())


def test_what_was_made_before_a_checkpoint_was_mended_is_not_used(tmp_path, monkeypatch):
    """Altered and mended under the same mtime, as a copy that keeps it does; the disk was full in between."""
    source = write_hub_directory(tmp_path / "hf", LLAMA, hub_state(LLAMA))
    megatron = convert(source, tmp_path / "megatron", "megatron", options(), Alone())
    expected = convert(megatron, tmp_path / "expected", "hf", options(), Alone())
    shards = sorted(p.name for p in expected.glob("*.safetensors"))
    files = sorted(megatron.glob("*.distcp"))
    whole, stamps = [file.read_bytes() for file in files], [file.stat() for file in files]

    def rewrite(change: Callable[[bytes], bytes]) -> None:
        for file, content, stamp in zip(files, whole, stamps, strict=True):
            file.write_bytes(change(content))
            os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))

    def until_full(path: Path, *given: object) -> None:
        if Path(path).name.startswith(shards[-1]):
            raise OSError(errno.ENOSPC, "No space left on device")
        write_tensors(path, *given)

    rewrite(lambda content: (at := len(content) // 2) and content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with monkeypatch.context() as patch:
        patch.setattr(to_hf, "write_tensors", until_full)
        with pytest.raises(CheckpointError, match="No space left.*the same command goes on"):
            convert(megatron, megatron / "out", "hf", options(), Alone())
    assert (megatron / "out.partial" / shards[0]).exists()
    rewrite(lambda content: content)
    made = convert(megatron, megatron / "out", "hf", options(verify=False), Alone())
    assert all((made / p.name).read_bytes() == p.read_bytes() for p in expected.iterdir())


def test_an_out_inside_the_checkpoint_goes_on_where_it_was(tmp_path):
    source = write_hub_directory(tmp_path / "hf", LLAMA, hub_state(LLAMA))
    megatron = convert(source, tmp_path / "megatron", "megatron", options(), Alone())
    config, _ = to_hf.find_config(megatron, None)
    plan = to_hf.ToHF(megatron, config, tokenizer_from=None, max_file_bytes=SMALL)
    before = plan.describe()
    (megatron / "out.partial").mkdir()
    assert plan.describe() == before


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_many_processes_make_the_same_files(tmp_path, launcher):
    if launcher == "mpirun" and (shutil.which("mpirun") is None or subprocess.run(
            [sys.executable, "-c", "import mpi4py.MPI"], capture_output=True).returncode):  # fmt: skip
        pytest.skip("needs mpi4py and mpirun")
    source = write_hub_directory(tmp_path / "hf", LLAMA, hub_state(LLAMA))
    alone = convert(source, tmp_path / "alone", "megatron", options(), Alone())
    start = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"],
        "mpirun": ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "3", sys.executable],
    }[launcher]
    tool = Path(__file__).parents[3] / "tools" / "convert_checkpoint.py"
    done = subprocess.run(
        [*start, str(tool), "--to-megatron", str(source), str(tmp_path / "many"), "--max-shard-size", str(SMALL)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = sorted(p.name for p in alone.iterdir())
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == names
    assert all((tmp_path / "many" / n).read_bytes() == (alone / n).read_bytes() for n in names if n != "manifest.json")


def make_run(base: Path, seeds: list[int]) -> Path:
    """A run directory: config.yaml with the model's path, and one checkpoint for each seed, step_000001 first."""
    run = base / "run"
    for step, seed in enumerate(seeds, start=1):
        hf = write_hub_directory(base / f"hf{seed}", LLAMA, hub_state(LLAMA, seed=seed))
        out = run / "checkpoints" / f"step_{step:06d}"
        out.parent.mkdir(parents=True, exist_ok=True)
        convert(hf, out, "megatron", options(), Alone())
        (out / "config.json").unlink()  # a run's own checkpoints have none
        manifest = json.loads((out / "manifest.json").read_text())
        del manifest["files"]["config.json"], manifest["sha256"]
        (out / "manifest.json").write_text(json.dumps(manifest))
    (run / "config.yaml").write_text(f"model: {{path: {base / f'hf{seeds[0]}'}}}\n")
    return run


def test_a_run_is_converted_from_its_newest_whole_checkpoint(tmp_path, caplog):
    run = make_run(tmp_path, [0, 1])
    (run / "tokenizer").mkdir()
    (run / "tokenizer" / "tokenizer.json").write_text("{}")  # a stage's own comes before its model's
    back = HFTensors(convert(run, tmp_path / "newest", "hf", options(), Alone()))
    assert (tmp_path / "newest" / "tokenizer.json").exists()
    assert not (tmp_path / "newest" / "tokenizer_config.json").exists()
    assert all(torch.equal(back[name], tensor) for name, tensor in hub_state(LLAMA, seed=1).items())
    os.truncate(run / "checkpoints" / "step_000002" / "__0_0.distcp", 1000)
    back = HFTensors(convert(run, tmp_path / "before", "hf", options(), Alone()))
    assert all(torch.equal(back[name], tensor) for name, tensor in hub_state(LLAMA, seed=0).items())
    assert "step_000002 is not whole (__0_0.distcp has 1000 bytes" in caplog.text
    shutil.rmtree(run / "checkpoints" / "step_000001")
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        convert(run, tmp_path / "none", "hf", options(), Alone())


def test_the_command(tmp_path):
    from typer.testing import CliRunner

    from r1mega.cli import app

    source = write_hub_directory(tmp_path / "hf", LLAMA, hub_state(LLAMA))
    run = CliRunner().invoke
    sizes = ["--max-shard-size", "60KB"]
    done = run(app, ["convert", "--to-megatron", str(source), str(tmp_path / "m"), "--parallel", "tp=2", *sizes])
    assert done.exit_code == 0, done.output
    done = run(app, ["convert", "--to-hf", str(tmp_path / "m"), str(tmp_path / "back"), "--dtype", "float32", *sizes])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1] == str(tmp_path / "back")
    back = HFTensors(tmp_path / "back")
    assert all(torch.equal(back[name], tensor.float()) for name, tensor in hub_state(LLAMA).items())
    assert read_config(tmp_path / "back")["torch_dtype"] == "float32"
    for wrong in ([], ["--to-hf", "--to-megatron"], ["--to-hf", "--dtype", "int8"], ["--to-hf", "--parallel", "tp=x"]):
        assert isinstance(run(app, ["convert", str(source), str(tmp_path / "x"), *wrong]).exception, ConfigError)


def test_a_published_tokenizer_with_code_of_its_own_comes_along(tmp_path):
    """As Moonlight's: tiktoken.model and the Python files that `auto_map` names."""
    source = write_hub_directory(tmp_path / "hf", LLAMA, hub_state(LLAMA))
    files = ("tiktoken.model", "tokenization_moonshot.py", "configuration_deepseek.py", "generation_config.json")
    for name in files:
        (source / name).write_text(f"# {name}")
    back = there_and_back(source, tmp_path)
    assert all((back / name).read_text() == f"# {name}" for name in files)


def test_the_pipeline_of_a_layout_cuts_no_tensor():
    """DeepSeek-V3's 61 layers on 16 stages want layers_per_stage, of which the files know nothing."""
    assert parse_parallel("tp=8,pp=16,vpp=2,ep=32") == ParallelConfig(tp=8, ep=32)


def test_a_written_file_is_what_the_library_reads(tmp_path):
    tensors = {"b": torch.randn(3, 5), "a": torch.arange(7), "c": torch.tensor(2.5, dtype=torch.bfloat16)}
    specs = {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    safetensors_file.write_tensors(tmp_path / "x.safetensors", specs, tensors.items())
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(torch.equal(file.get_tensor(n), t) for n, t in tensors.items())
    save_file(tensors, tmp_path / "y.safetensors")
    header = safetensors_file.read_header(tmp_path / "y.safetensors")
    assert all(torch.equal(safetensors_file.read_tensor(header[n]), t) for n, t in tensors.items())
    with pytest.raises(ValueError, match="not what comes next"):
        safetensors_file.write_tensors(tmp_path / "z", specs, [("a", tensors["a"])])
