"""Checkpoints across layouts: converted ones into every layout bit by bit, trained ones resumed in another layout."""

from __future__ import annotations

import pytest
import torch

from r1mega.checkpoint.conversion import run_conversion
from r1mega.checkpoint.hf import HFTensors, read_config
from r1mega.checkpoint.to_hf import ToHF, find_checkpoint
from r1mega.checkpoint.to_megatron import ToMegatron
from r1mega.checkpoint.workers import Alone
from tests.checkpoints import FAMILIES, MTP, hub_state, write_hub_directory
from tests.dist.convert_worker import load_converted, resume_run, save_run
from tests.dist.launch import launch
from tests.reference import Layout

LIMIT = 100_000  # bytes a file, so that there are several
# the loss in a stage of its own
ALONE = {"pp": 2, "layers_per_stage": (MTP["num_hidden_layers"], 0), "mtp_standalone": True}
LOADS = {  # family: (the layout it is written for, the layouts it is loaded in)
    "deepseek_v3_mtp": (Layout(tp=2, ep=2), [{}, {"tp": 2, "ep": 2}, {"ep": 2}, {"pp": 2}, ALONE]),
    "deepseek_v2_lite": (Layout(), [{"tp": 2, "ep": 2}]),
    "moonlight": (Layout(ep=2), [{"pp": 2}]),
    "kimi_k2": (Layout(ep=2), [{}, {"tp": 2, "ep": 2}, {"pp": 2}]),
    "llama": (Layout(), [{"tp": 2}]),
    "qwen2_tied": (Layout(tp=2), [{"pp": 2}, {"tp": 2}]),
    "qwen3": (Layout(), [{"tp": 2}, {"pp": 2}]),
    "qwen3_moe": (Layout(tp=2, ep=2), [{}, {"tp": 2, "ep": 2}, {"ep": 2, "etp": 1}, {"pp": 2}]),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """One set of processes loads every family in its layouts."""
    cases = []
    for family, (written_for, layouts) in LOADS.items():
        base = tmp_path_factory.mktemp("convert") / family
        hf = write_hub_directory(base / "hf", FAMILIES[family], hub_state(FAMILIES[family]))
        out = run_conversion(ToMegatron(hf, written_for, max_file_bytes=LIMIT), base / "megatron", Alone())
        cases += [(out, layout, hf) for layout in layouts]
    return launch(load_converted, 2, cases, timeout_seconds=600)


@pytest.mark.parametrize("case", [f"{family} {layout}" for family, (_, layouts) in LOADS.items() for layout in layouts])
def test_converted_weights_are_the_same_bits_in_every_layout(loaded, case):
    assert [rank[case] for rank in loaded] == [[], []]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def run(tmp_path_factory, request):
    """A run of 4 ranks, TP 2 x EP 2, that saved after 0 and 2 steps in the background, and went on to 4."""
    base, dtype = tmp_path_factory.mktemp("run"), request.param
    config = MTP | {"vocab_size": 97}  # padded under TP
    hf = write_hub_directory(base / "hf", config, hub_state(config, torch.float32))
    source = run_conversion(
        ToMegatron(hf, Layout(tp=2, ep=2), dtype=torch.float32, max_file_bytes=LIMIT), base / "start", Alone()
    )
    config = read_config(source)
    launch(save_run, 4, base / "run", config, {"tp": 2, "ep": 2}, source, dtype, True, timeout_seconds=600)
    return base / "run", config, dtype


@pytest.mark.parametrize(
    ("ranks", "cases"), [(1, [({}, 2)]), (2, [({"pp": 2}, 2), ({"ep": 2}, 2), ({"tp": 2}, 0), (ALONE, 2)])]
)
def test_a_run_goes_on_in_another_layout_as_if_uninterrupted(run, ranks, cases):
    """What is loaded is bit for bit what was saved. In bfloat16 the steps after it differ by no more than twice what
    rounding changes in the uninterrupted run."""
    path, _, dtype = run
    rounding = (5e-6, 5e-6, 5e-4) if dtype == "float32" else torch.load(path / "uninterrupted.pt")["rounding"]
    limits = [2 * value for value in rounding]
    for results in launch(resume_run, ranks, *run, cases, timeout_seconds=600):
        assert len(results) == len(cases)
        for name, (changed, *found) in results.items():
            assert changed == [], name
            assert all(value <= limit for value, limit in zip(found, limits, strict=True)), (name, found, limits)


def test_a_trained_checkpoint_becomes_the_exported_weights(run, tmp_path):
    path, config, _ = run
    expected = torch.load(path / "uninterrupted.pt")["at_save"]
    checkpoint, _ = find_checkpoint(path, Alone())
    out = run_conversion(ToHF(checkpoint, config, tokenizer_from=None, max_file_bytes=LIMIT), tmp_path / "hf", Alone())
    tensors = HFTensors(out)
    assert expected.keys() <= set(tensors)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    copies = set(tensors) - expected.keys()
    layer = f"model.layers.{config['num_hidden_layers']}"
    assert copies == {f"{layer}.embed_tokens.weight", f"{layer}.shared_head.head.weight"}
