"""CPU seconds a rank of what rank 0 deals out in the data stages, on 1, 2 and 4 ranks: tokenising, filters, MinHash, decontamination.

    python tools/bench_data_work.py --samples 96 --words 4000

Processor time and not the clock, so that ranks that share a processor count as if each had its own. What rank 0 alone does (the
index of the hashes, handing out, taking in) is told beside it. The last lines calculate a data set of --whole samples on --ranks-of-job.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import datasketch  # noqa: F401  # before the forks: an import is no work
import torch.distributed as dist

from r1mega.config.data_factory import DecontaminationConfig, DuplicateConfig, FilterConfig
from r1mega.config.stages.sft import SFTData
from r1mega.data.duplicates import signatures
from r1mega.data.filters import Candidate, build_filters, first_takers
from r1mega.data.selection import contaminated, text_of, without_duplicates
from r1mega.data.sft import tokenise
from r1mega.data.tokenizer import load_tokenizer
from r1mega.platform import groups
from r1mega.types import Deal

U = TypeVar("U")
V = TypeVar("V")
TOKENS = 8000
"""Of a whole response; --words of them are made here."""


def responses(count: int, words: int, seed: int = 1) -> list[Candidate]:
    """Of words of a vocabulary of 20,000, in paragraphs of 60."""
    chance = random.Random(seed)
    known = ["".join(chance.choices("etaoinshrdlucm", k=chance.randint(2, 9))) for _ in range(20000)]

    def text() -> str:
        drawn = chance.choices(known, k=words)
        return "\n\n".join(" ".join(drawn[i : i + 60]) for i in range(0, words, 60))

    return [
        Candidate(
            id=str(i), prompt_id=str(i), question=" ".join(chance.choices(known, k=40)), kind="math", language="en",
            response=f"<think>{text()}</think> <answer>{i}</answer>", template="r1_zero", source="", tokens=2 * words,
            parts={"accuracy": 1.0, "format": 1.0},
        )
        for i in range(count)
    ]  # fmt: skip


def make_tokenizer(directory: Path, texts: Sequence[str]) -> None:
    """A byte-level BPE of 16,000 words, as tokenizers of models are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=16000, special_tokens=["<eos>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>").save_pretrained(directory)


def measure(directory: Path, candidates: Sequence[Candidate]) -> dict[str, float]:
    """CPU seconds of this rank by work, and of rank 0's own part. A collective call."""
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[Sequence[U]], list[V]]) -> Callable[[Sequence[U]], list[V]]:
        def run(items: Sequence[U]) -> list[V]:
            began = time.process_time()
            try:
                return work(items)
            finally:
                seconds[name] = seconds.get(name, 0.0) + time.process_time() - began

        return run

    duplicates = DuplicateConfig()
    data = SFTData(files=(), max_tokens=10**6)
    outside = DecontaminationConfig(files=(directory / "questions.jsonl",))
    tokenised = timed("tokenise", functools.partial(tokenise, data, load_tokenizer(directory)))
    filtered = timed("filters", functools.partial(first_takers, build_filters(FilterConfig())))
    signed_by = timed("hash", functools.partial(signatures, duplicates.ngram, duplicates.num_permutations))
    found_in = timed("decontaminate", functools.partial(contaminated, outside))

    def make(deal: Deal) -> None:
        began = time.process_time()
        lines = [(c.id, {"question": c.question, "response": c.response}) for c in candidates]
        deal(tokenised, lines)
        deal(filtered, candidates)
        signed = deal(signed_by, [text_of(c) for c in candidates])
        without_duplicates(list(candidates), duplicates, signed)
        deal(found_in, candidates)
        seconds["rank 0 alone"] = time.process_time() - began - sum(seconds.values())

    groups.lead(make, (tokenised, filtered, signed_by, found_in))
    return seconds


def on_ranks(ranks: int, directory: Path, candidates: Sequence[Candidate]) -> list[dict[str, float]]:
    """What each rank measured; ranks are forks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for rank in range(ranks):
        if os.fork() == 0:
            code = 1
            try:
                place = {
                    "RANK": rank,
                    "LOCAL_RANK": rank,
                    "WORLD_SIZE": ranks,
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                }
                os.environ |= {name: str(value) for name, value in place.items()}
                groups.init_distributed()
                found = measure(directory, candidates if rank == 0 else ())
                (directory / f"{ranks}.{rank}.json").write_text(json.dumps(found))
                dist.barrier()
                code = 0
            finally:
                os._exit(code)
    if any(os.wait()[1] for _ in range(ranks)):
        sys.exit("a rank failed; its error stands above")
    return [json.loads((directory / f"{ranks}.{rank}.json").read_text()) for rank in range(ranks)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--words", type=int, default=4000)
    parser.add_argument("--whole", type=int, default=600_000)
    parser.add_argument("--ranks-of-job", type=int, default=256)
    arguments = parser.parse_args()
    candidates, shared, alone = responses(arguments.samples, arguments.words), 0.0, 0.0
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make_tokenizer(directory, [c.response for c in candidates[:16]])
        tokens = sum(len(load_tokenizer(directory).encode(c.response)) for c in candidates[:16]) / min(
            16, len(candidates)
        )
        questions = responses(1000, 1, seed=2)
        (directory / "questions.jsonl").write_text(
            "".join(json.dumps({"question": c.question}) + "\n" for c in questions)
        )
        print(
            "| ranks | "
            + " | ".join(works := ["tokenise", "filters", "hash", "decontaminate"])
            + " | all four | rank 0 alone |"
        )
        print("|---|---|---|---|---|---|---|")
        for ranks in (1, 2, 4):
            found = on_ranks(ranks, directory, candidates)
            most = {work: max(rank.get(work, 0.0) for rank in found) for work in works}
            cells = [*most.values(), sum(most.values()), found[0]["rank 0 alone"]]
            print(f"| {ranks} | " + " | ".join(f"{seconds:.2f}" for seconds in cells) + " |", flush=True)
            shared, alone = (cells[-2], 0.0) if ranks == 1 else (shared, cells[-1])
    scale = arguments.whole / arguments.samples * TOKENS / tokens
    job = arguments.ranks_of_job
    print(f"\na response has {tokens:,.0f} tokens; {arguments.whole:,} of {TOKENS:,} on {job} ranks, calculated: "
          f"{shared * scale / job / 3600:.2f} h of each rank, and {alone * scale / 3600:.2f} h of rank 0 alone")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
