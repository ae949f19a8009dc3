"""Run on two ranks, as by torchrun: data-parallel engines, then one over both, its experts cut, then spread, then
data-parallel engines that share experts.

Argument: the HF directory. Rank 0 prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from r1mega.checkpoint import safetensors_file
from r1mega.checkpoint.hf import HFTensors
from r1mega.platform import groups
from r1mega.rollout.engine import EngineSettings
from r1mega.rollout.vllm_engine import VllmEngine
from r1mega.rollout.work_sharing import NOBODY, SharedGroups
from r1mega.weights import verify
from r1mega.weights.transfer import DigestTap, checkpoint_tensors, read_weights
from tests.unit.rollout.sharing import fail_apart, sample_together
from tests.unit.rollout.tiny_models import greedy_requests, sampled_requests

read = []
"""Bytes of tensors that this rank has read from files, by engine."""
said = []
"""Errors where one of two generators that share experts fails."""


def count_reads(file, tensor) -> None:
    read[-1] += tensor.nbytes
    READ(file, tensor)


READ, safetensors_file.read_exactly = safetensors_file.read_exactly, count_reads


def run(directory: Path, tp: int, requests, ep: int = 1) -> list:
    """What an engine that read its own weights says; they are those that the loaders of vLLM put there."""
    read.append(0)
    engine = VllmEngine(
        EngineSettings(directory, 128, max_num_seqs=64, kv_cache_bytes=32 << 20, tp=tp, ep=ep, weights="checkpoint")
    )
    own, own_bytes = engine.weights_digest(), read[-1]
    tap = DigestTap(torch.float32, engine.config)
    engine.update_weights(tap(checkpoint_tensors(directory)))
    verify.compare_digests(tap.digest, own)
    verify.compare_digests(tap.digest, engine.weights_digest())
    with engine.parameters_for_writing() as parameters:
        read_weights(engine._target, HFTensors(directory), parameters)  # this rank's own reading is what generates
    read[-1] = own_bytes
    engine.sleep()
    engine.wake_up()
    result = [[(r.token_ids, r.log_probs) for r in samples] for samples in engine.generate(requests)]
    if tp > ep:  # it takes what is not begun with, as both ranks are told by the first
        waiting = [SimpleNamespace(owner=NOBODY, request=request) for request in requests[1:]]
        shared = SharedGroups(waiting, "work/ranks", groups.GeneratorPlace.of_this_rank(tp), groups.generator_ranks(tp))
        found = list(engine.stream(requests[:1], refill=lambda: [group.request for group in shared()]))
        assert len(found) == sum(map(len, result)) and all(group.owner == 0 for group in waiting)
        for done in found:
            assert done.response.token_ids == result[done.request_index][done.sample_index][0]
    if ep > tp:  # one engine has nothing to do, then leaves early: the other ends all the same
        assert len(engine.generate(requests[:1] if dist.get_rank() else [])) == dist.get_rank()
        stream = engine.stream(requests)
        for completion in stream:
            assert completion.response.token_ids == result[completion.request_index][completion.sample_index][0]
            if dist.get_rank() == 1:
                break
        stream.close()
        sample_together(engine)
        said.extend(fail_apart(engine, requests))
        again = engine.generate(requests)
        assert [[r.token_ids for r in samples] for samples in again] == [[t for t, _ in samples] for samples in result]
    engine.close()
    return result


def main(directory: Path) -> None:
    groups.init_distributed()
    torch.set_num_threads(1)
    rank, requests = dist.get_rank(), [*sampled_requests(3, max_tokens=8), *greedy_requests(1, max_tokens=8)]
    mine = run(directory, 1, requests[rank::2])  # each data-parallel rank has its own requests
    together = run(directory, 2, requests[2:])  # tensor-parallel ranks are given the same ones
    spread = run(directory, 2, requests[2:], ep=2)
    shared = run(directory, 1, requests[rank::2] if rank else requests, ep=2)  # rank 1 is done first
    gathered = [None, None]
    dist.all_gather_object(
        gathered, {"dp": mine, "tp": together, "ep": spread, "shared": shared, "read": read, "said": said}
    )  # the trainer's groups still work
    if rank == 0:
        print(json.dumps(gathered))
    groups.destroy()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
