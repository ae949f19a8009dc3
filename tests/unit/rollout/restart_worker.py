"""Run as a script in a fresh process: Megatron and vLLM in one process in either order, a history, then fixed requests.

Arguments: the order of the two libraries, whether to have a history, HF directories. Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from r1mega.checkpoint.hf_state import export_hf, load_hf
from r1mega.platform import groups
from r1mega.rollout.engine import EngineSettings
from r1mega.rollout.vllm_engine import VllmEngine
from r1mega.weights import verify
from r1mega.weights.transfer import DigestTap, checkpoint_tensors
from tests.reference import Layout, ModelSettings
from tests.unit.rollout.tiny_models import greedy_requests, prompt, sampled_requests

SEQUENCES = [prompt(20), prompt(30)]


def build_megatron(config: dict, directory: Path):
    from r1mega.model.build import build_model

    groups.init_parallel(Layout(), seed=0)
    (model,) = build_model(config, Layout(), ModelSettings())
    load_hf([model], dict(checkpoint_tensors(directory)))
    return model


@torch.no_grad()
def megatron_log_probs(model) -> list[list[float]]:
    result = []
    for sequence in SEQUENCES:
        tokens = torch.tensor([sequence])
        logits = model(tokens, torch.arange(len(sequence))[None], None)[0, :-1, :96].log_softmax(-1)
        result.append(logits.gather(1, tokens[0, 1:, None])[:, 0].tolist())
    return result


def run(order: str, history: bool, directory: Path) -> dict:
    settings = EngineSettings(directory, 128, max_num_seqs=64, kv_cache_bytes=32 << 20)
    if order == "megatron_first":
        model = build_megatron(json.loads((directory / "config.json").read_text()), directory)
        before = megatron_log_probs(model)
        engine = VllmEngine(settings)
        assert megatron_log_probs(model) == before, "the trainer computes something else beside the generator"
    else:
        engine = VllmEngine(settings)
        model = build_megatron(engine.config, directory)
    tap = DigestTap(torch.float32, engine.config)
    if history:  # what an uninterrupted run has behind it and a resumed one has not
        engine.update_weights(checkpoint_tensors(directory))
        engine.generate(sampled_requests(5, num_samples=7, seed=40))
        engine.sleep()
        torch.rand(1000)
    engine.update_weights(tap(export_hf([model])))
    engine.wake_up()
    verify.compare_digests(tap.digest, engine.weights_digest())
    result = verify.probe(engine, SEQUENCES, megatron_log_probs(model), verify.PROBE_LIMITS[torch.float32])
    requests = [*sampled_requests(4), *greedy_requests(2), *sampled_requests(2, temperature=0.7, top_p=0.9)]
    responses = [
        [(r.token_ids, [x.hex() for x in r.log_probs]) for r in samples] for samples in engine.generate(requests)
    ]
    engine.close()
    groups.destroy()
    return {"responses": responses, "difference": result.max_difference}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([run(sys.argv[1], sys.argv[2] == "history", Path(directory)) for directory in sys.argv[3:]]))
