"""Model FLOPs against torch's own count of what transformers executes, against published sizes, and by brute force."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from r1mega.errors import ConfigError
from r1mega.model.flops import Work, generation_work, model_flops, sequences_work
from r1mega.platform.peaks import peak_tflops
from tests.reference import DEEPSEEK, DENSE, QWEN3_MOE, make_hf_model

CASES = {
    "deepseek": DEEPSEEK,
    "deepseek_no_q_lora": DEEPSEEK | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 4},
    "two_shared_experts": DEEPSEEK | {"n_shared_experts": 2, "first_k_dense_replace": 2},
    "llama": DENSE | {"model_type": "llama"},
    "qwen2": DENSE | {"model_type": "qwen2"},
    "qwen3": DENSE | {"model_type": "qwen3", "head_dim": 24},
    "qwen3_moe": QWEN3_MOE | {"mlp_only_layers": [1]},
}
LENGTH = 40


def counted(config, *, backward):
    """What torch counts in one sequence through transformers' model, forward or both."""
    model = make_hf_model(config)
    model.config._experts_implementation = "eager"  # torch has no count for grouped products
    tokens = torch.randint(0, config["vocab_size"], (1, LENGTH))
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=tokens, use_cache=False).logits
        if backward:
            logits.logsumexp(-1).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_it_is_what_torch_counts(config):
    """Exactly, but for one thing: eager attention computes the masked half of the pairs too."""
    flops = model_flops(config)
    square = Work(tokens=LENGTH, pairs=LENGTH * LENGTH, scored=LENGTH)
    assert counted(config, backward=False) == flops.forward(square)
    assert counted(config, backward=True) == flops.training(square)


@pytest.mark.parametrize(
    ("name", "active"),
    [
        ("deepseek_v3_671b", 36.6e9),  # published with the weights: the output head counted, the input embedding not
        ("moonlight_16b", 2.24e9 + 163840 * 2048),  # published without the embeddings of input and output
        ("qwen3_30b_a3b", 3.35e9 - 151936 * 2048),  # 3.3B published, both embeddings counted
        ("kimi_k2", 31.7e9),  # 32B published
    ],
)
def test_a_token_costs_twice_the_published_active_parameters(name, active):
    hf = json.loads((Path("configs") / name / "model/config.json").read_text())
    assert model_flops(hf).forward(Work(tokens=1, scored=1)) == pytest.approx(2 * active, rel=0.005)


def test_multi_token_prediction_of_deepseek_v3():
    """Published: the module for the next but one token has 14B parameters, 11.5B of its own; a token meets its experts'
    share of those, and the output head of the main model.
    """
    hf = json.loads(Path("configs/deepseek_v3_671b/model/config.json").read_text())
    flops = model_flops(hf)
    unmet = (256 - 8) * 3 * 7168 * 2048  # parameters of the experts that a token does not meet
    one = flops.training(Work(tokens=1), mtp_loss=True) - flops.training(Work(tokens=1))
    assert one / (3 * 2) + unmet == pytest.approx(11.5e9, rel=0.01)
    assert flops.further.scored == flops.main.scored and flops.further.pair * 61 == flops.main.pair


def test_pairs_by_brute_force():
    lengths = [(1, 0), (7, 3), (12, 12)]
    pairs = sum(1 for n, _ in lengths for query in range(n) for key in range(n) if key <= query)
    assert sequences_work(lengths) == Work(20, pairs, 15)
    prompt, responses = 5, [1, 4, 9]
    prefill = [query + 1 for query in range(prompt - 1)]  # keys that each position of the shared prompt attends to
    decoded = [query + 1 for n in responses for query in range(prompt - 1, prompt - 1 + n)]
    expected = Work(len(prefill) + len(decoded), sum(prefill) + sum(decoded), len(decoded))
    assert generation_work(prompt, responses) == expected


def test_sampling_one_response_alone_costs_what_scoring_it_costs():
    """The last token of a response is scored but never processed; all others are the same positions."""
    flops = model_flops(DEEPSEEK)
    whole = sequences_work([(5 + 9 - 1, 9)])
    assert flops.forward(generation_work(5, [9])) == flops.forward(whole)


def test_unknown_model_type():
    with pytest.raises(ConfigError, match="mamba"):
        model_flops({"model_type": "mamba"})
    with pytest.raises(ConfigError, match="kv_lora_rank"):
        model_flops({k: v for k, v in DEEPSEEK.items() if k != "kv_lora_rank"})


@pytest.mark.parametrize(
    ("name", "fp8", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", False, 989.4),
        ("NVIDIA H100 80GB HBM3", True, 1978.9),
        ("NVIDIA H100 PCIe", False, 756.0),
        ("NVIDIA H200", False, 989.4),
        ("NVIDIA B200", True, 4500.0),
        ("NVIDIA GB200", False, 2500.0),
        ("NVIDIA A100-SXM4-80GB", False, 312.0),
    ],
)
def test_peaks_of_the_data_sheets(name, fp8, tera):
    assert peak_tflops(name, "bfloat16", fp8) == tera


def test_no_peak_where_none_is_known():
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "bfloat16", fp8=True) is None
    assert peak_tflops("NVIDIA H100 80GB HBM3", "float32") is None
    assert peak_tflops("Some other device", "bfloat16") is None
