"""A checkpoint whose accuracy is known without asking it."""

import json

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from r1mega.data.nano import write_prompts
from r1mega.data.nano_tokenizer import train_tokenizer
from r1mega.data.template import render
from r1mega.data.tokenizer import load_tokenizer
from tests.unit.evaluate.taught_model import COMPLETION, SEED


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "eval.jsonl"
    write_prompts(path, seed=SEED, count=24, split="eval")
    return path


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory, data):
    """A run directory with an export of the taught model."""
    root = tmp_path_factory.mktemp("run")
    path = root / "hf"
    path.mkdir()
    train_tokenizer(path)
    tokenizer = load_tokenizer(path)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=192, tie_word_embeddings=False,
    ))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    completion = [*tokenizer.encode(COMPLETION), tokenizer.eos_token_id]
    questions = [json.loads(line)["question"] for line in data.read_text().splitlines()]
    for step in range(150):
        prompt = tokenizer.encode_prompt(render("nano", questions[step % len(questions)]))
        labels = torch.tensor([[-100] * len(prompt) + completion])
        loss = model(torch.tensor([prompt + completion]), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.02, "the model did not learn its line"
    model.save_pretrained(path)
    rollout = {"stop": ["</answer>"], "max_response_tokens": 48}
    config = {"stage": "zero", "data": {"template": "nano"}, "rollout": rollout, "reward": {"format": {"weight": 0.5}}}
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    return root
