"""What needs processes of its own: restarts, Megatron beside vLLM in either order, two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from r1mega.checkpoint.hf import HFTensors
from tests import processes
from tests.unit.rollout.tiny_models import checkpoint, greedy_requests, hf_logits, sampled_requests

pytestmark = pytest.mark.heavy

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[3]


def start(*command: str) -> subprocess.Popen:
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def last_json(process: subprocess.Popen):
    """The last line that the process prints, as JSON."""
    try:
        output, errors = process.communicate(timeout=290)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-4000:]
    return last_line(output)


def last_line(output: str):
    return json.loads(output.strip().splitlines()[-1])


def test_a_restarted_generator_is_bitwise_the_same():
    """One process has Megatron first and a history behind it, the other vLLM first and none; the bits are the same."""
    script = str(HERE / "restart_worker.py")
    directories = [str(checkpoint(name)) for name in ("deepseek", "qwen3_tied")]
    started = [
        start(sys.executable, script, "megatron_first", "history", *directories),
        start(sys.executable, script, "vllm_first", "none", *directories),
    ]
    for long, resumed in zip(*map(last_json, started), strict=True):
        assert long["responses"] == resumed["responses"]
        assert max(long["difference"], resumed["difference"]) <= 2e-4


def test_two_ranks_data_tensor_and_expert_parallel():
    """Two generators, one over two ranks, with experts cut and with whole experts spread, and two that share experts say the
    same; their log-probs are those of transformers. Each rank reads what it holds."""
    worker = ("-m", "tests.unit.rollout.ranks_worker")
    done = processes.run(checkpoint("deepseek"), program=worker, num_ranks=2, separate=True)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = last_line(done.stdout)
    told = "the generator of rank 1 failed, and this one shares experts with it"
    assert len(ranks[0]["said"]) == 4 and all(text.startswith(told) for text in ranks[0]["said"])
    own = ("request 0: the prompt has no tokens", "sequence 0 has 1 tokens", "no more", "not taken")
    assert [text[: len(start)] for text, start in zip(ranks[1]["said"], own, strict=True)] == list(own)
    infos = HFTensors(checkpoint("deepseek")).infos
    experts = sum(info.num_bytes for name, info in infos.items() if ".mlp.experts." in name)
    whole, cut, spread, shared = (max(rank["read"][kind] for rank in ranks) for kind in range(4))
    assert whole <= sum(info.num_bytes for info in infos.values())
    assert spread < shared <= whole - experts // 2  # half of the experts
    assert cut <= whole - experts // 3  # half of the rows of two of an expert's three matrices
    requests = [*sampled_requests(3, max_tokens=8), *greedy_requests(1, max_tokens=8)]
    data_parallel = [ranks[i % 2]["dp"][i // 2] for i in range(len(requests))]
    for kind in ("tp", "ep"):
        assert ranks[0][kind] == ranks[1][kind]
        for one, two in zip(data_parallel[2:], ranks[0][kind], strict=True):  # the last two requests
            assert [tokens for tokens, _ in one] == [tokens for tokens, _ in two]
    for rank, alike in ((0, data_parallel), (1, data_parallel[1::2])):
        for one, two in zip(alike, ranks[rank]["shared"], strict=True):
            assert [tokens for tokens, _ in one] == [tokens for tokens, _ in two]
    answered = (*data_parallel, *ranks[0]["tp"], *ranks[0]["ep"], *ranks[0]["shared"], *ranks[1]["shared"])
    asked = (*requests, *requests[2:], *requests[2:], *requests, *requests[1::2])
    for request, samples in zip(asked, answered, strict=True):
        for tokens, log_probs in samples:
            length = len(request.prompt_token_ids)
            logits = hf_logits("deepseek", (*request.prompt_token_ids, *tokens))[length - 1 : -1].log_softmax(-1)
            assert np.abs(logits[range(len(tokens)), tokens].numpy() - log_probs).max() <= 2e-4
