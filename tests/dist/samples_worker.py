"""Samples of drawn layouts through the exchange, on every rank: what arrives, and the bytes that it took."""

from __future__ import annotations

import dataclasses
import gc
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from r1mega.config.schema import DataConfig, ModelConfig
from r1mega.config.stages.rl import RLStage, UpdateConfig
from r1mega.errors import R1MegaError, RewardError
from r1mega.plan.samples import Sizes, sample_memory
from r1mega.platform import groups
from r1mega.rollout.draw import Sample, grade_samples
from r1mega.rollout.sampler import Scorer
from r1mega.rollout.shared_scoring import share_scoring
from r1mega.train.grpo_update import _plan
from r1mega.train.packing import plan_packing, split_minibatches
from r1mega.train.sample_exchange import SampleExchange
from r1mega.train.sample_plan import RankPlace, Reads, Routing
from r1mega.train.samples import training_samples
from r1mega.types import KeptIds, Prompt, Response, Reward, RewardStatus, RolloutGroup, TrainingSample

WORLD = 8
BUFFER = 1 << 20


@dataclass(frozen=True)
class Case:
    """A drawn run: layout, model and the step's samples. layers: MoE layers of each pipeline stage; made: by generators."""

    tp: int
    cp: int
    pp: int
    generator_tp: int
    routing: Routing
    layers: tuple[tuple[int, ...], ...]
    made: tuple[tuple[TrainingSample, ...], ...]
    epochs: int
    limit: int
    seed: int

    @property
    def dp(self) -> int:
        return WORLD // (self.tp * self.cp * self.pp)

    def place(self, rank: int) -> RankPlace:
        """By Megatron's order of ranks, tp-cp-dp-pp."""
        replica, stage = rank // (self.tp * self.cp) % self.dp, rank * self.pp // WORLD
        first, last = stage == 0, stage == self.pp - 1
        cp, cp_rank = (1, 0) if self.tells(rank) else (self.cp, rank // self.tp % self.cp)
        reads = Reads(first or last, last, cp, cp_rank)
        return RankPlace(rank // self.generator_tp, replica, self.layers[stage], reads)

    def tells(self, rank: int) -> bool:
        """Whether it writes microbatches down: the first rank of a replica's last stage."""
        return rank * self.pp // WORLD == self.pp - 1 and rank % (self.tp * self.cp) == 0

    def read(self, rank: int, sample: TrainingSample) -> tuple[list[int], list[int], list[int]]:
        """(places of tokens, of log-probs, positions whose routing is replayed) that a rank reads, element by element: chunks of a
        sample that is padded to whole ones, the first with the last one, the second with the last but one.
        """
        stage, length = rank * self.pp // WORLD, sample.num_tokens
        chunk = next(size for size in range(1, length + 1) if size * 2 * self.cp >= length)
        dealt = [min(place // chunk, 2 * self.cp - 1 - place // chunk) for place in range(length)]
        seen = [p for p in range(length) if self.tells(rank) or dealt[p] == rank // self.tp % self.cp]
        tokens = set(seen) if stage in (0, self.pp - 1) else set()
        if stage == self.pp - 1:  # the logits at p predict p + 1
            tokens |= {place + 1 for place in seen if place + 1 < length}
        log_probs = list(range(sample.response_length)) if stage == self.pp - 1 else []
        return sorted(tokens), log_probs, [place for place in seen if place < length - 1]

    @property
    def samples(self) -> list[TrainingSample]:
        """Of the step, in the order in which everybody counts them."""
        return sorted((sample for part in self.made for sample in part), key=lambda sample: sample.slot)

    def shares(self) -> list[list[int]]:
        """Of each replica, from lengths alone."""
        lengths = [len(sample.token_ids) for sample in self.samples]
        shares: list[list[int]] = [[] for _ in range(self.dp)]
        for epoch in range(self.epochs):
            parts = [part for part in split_minibatches(len(lengths), 2, f"{self.seed}/{epoch}") if part]
            for ranks in plan_packing(lengths, parts, 64, self.dp).bins:
                for replica, bins in enumerate(ranks):
                    shares[replica] += [index for members in bins for index in members]
        return shares


def draw(seed: int) -> Case:
    """Whole samples on some generators and none on others; experts of 1 to 10 bits, or no routing at all."""
    generator = random.Random(seed)
    numbers = np.random.default_rng(seed)
    tp, cp, pp = generator.choice(
        [(1, 1, 1), (2, 1, 2), (1, 2, 2), (2, 2, 1), (1, 1, 4), (2, 1, 1), (1, 4, 1), (2, 2, 2)]
    )
    routing = Routing(generator.choice([2, 8, 64, 160, 256, 384, 1000]), generator.choice([1, 3, 8]))
    num_layers = generator.choice([0, pp - 1, pp + 3])
    stages = sorted(generator.choices(range(pp), k=num_layers))
    layers = tuple(tuple(layer for layer, stage in enumerate(stages) if stage == own) for own in range(pp))
    generator_tp = generator.choice([1, 2, 4])
    slots = list(range(generator.choice([1, 5, 9])))
    lists, keeps = np.random.default_rng(seed + 1000), seed % 3 == 0
    made: list[list[TrainingSample]] = [[] for _ in range(WORLD // generator_tp)]
    for slot in slots:
        maker = generator.randrange(len(made))
        for place in range(generator.randrange(4)):
            prompt, response = generator.randrange(1, 9), generator.randrange(1, 40)
            length = prompt + response
            shape = (length - 1, num_layers, routing.top_k)
            routed = numbers.integers(0, routing.num_experts, shape)
            kind = np.uint8 if routing.num_experts <= 256 else np.uint16
            kept = [lists.integers(0, 1 << 17, lists.integers(1, 9)) for _ in range(response)] if keeps else None
            made[maker].append(
                TrainingSample(
                    numbers.integers(0, 1 << 17, length).astype(np.int32),
                    prompt,
                    float(numbers.normal()),
                    numbers.normal(size=response).astype(np.float32),
                    routed.astype(kind) if num_layers else None,
                    slot,
                    float(numbers.normal()),
                    place == 0,
                    None if kept is None else KeptIds.of(kept),
                )
            )
    return Case(
        tp, cp, pp, generator_tp, routing, layers, tuple(map(tuple, made)), generator.choice([1, 2]),
        generator.choice([200, 1500, 1 << 20]), seed,
    )  # fmt: skip


def lower_bound(case: Case) -> int:
    """Bytes that must move, element by element: what each rank reads of the samples that it trains on and has not made. The choices
    of a sample for one rank are whole bytes.
    """
    bits = next(width for width in range(1, 17) if 2**width >= case.routing.num_experts)
    total = 0
    for rank in range(WORLD):
        wanted = set(case.shares()[case.place(rank).replica])
        made = {id(sample) for sample in case.made[case.place(rank).generator]}
        for index in wanted:
            sample = case.samples[index]
            if id(sample) in made:
                continue
            tokens, log_probs, positions = case.read(rank, sample)
            total += sum(4 for _ in tokens) + sum(4 for _ in log_probs)
            if sample.kept is not None and log_probs:
                total += 4 * (len(sample.kept.counts) + len(sample.kept.ids))
            if sample.routed_experts is not None:
                columns = case.place(rank).columns
                choices = sum(len(sample.routed_experts[p][layer]) for p in positions for layer in columns)
                total += -(-choices * bits // 8)
    return total


def run_all(seeds: list[int]) -> dict[str, Any]:
    """The results of every function below, of one start."""
    groups.init_distributed()
    found = {
        "exchanges": run_exchanges(seeds),
        "refusals": run_refusals(),
        "scoring": {tp: run_scoring(tp) for tp in (1, 2, 4)},
    }
    groups.destroy()
    return found


def run_exchanges(seeds: list[int]) -> list[dict[str, Any]]:
    """For each drawn case: what is wrong on this rank, and the bytes that all ranks sent."""
    found = []
    for seed in seeds:
        case, rank = draw(seed), dist.get_rank()
        places = [case.place(other) for other in range(WORLD)]
        exchange = SampleExchange(places, case.routing, case.limit)
        made = sorted(case.made[places[rank].generator], key=lambda sample: -sample.slot)  # in any order of slots
        samples = exchange.index(made)
        wrong = [] if samples.known == [s.summary(_maker(case, s)) for s in case.samples] else ["what is known"]
        shares = case.shares()
        samples.fetch(shares)
        own = set(shares[places[rank].replica])
        if samples.indices != own:
            wrong.append("which are here")
        wrong += [f"sample {i}" for i in own if not _equal(samples[i], case.samples[i], case, rank)]
        sent = torch.tensor([exchange.bytes_sent])
        dist.all_reduce(sent)
        found.append({"wrong": wrong, "sent": int(sent)})
    return found


def run_refusals() -> list[str]:
    """How samples end of which one rank has something wrong: an expert, a token, a log-prob, a kept id, one sample less."""
    rank, found = dist.get_rank(), []
    exchange = SampleExchange([RankPlace(other // 2, other // 2, (0,)) for other in range(WORLD)], Routing(8, 1))
    for fault in ("none", "expert", "token", "log-prob", "kept", "sample"):
        ids, log_probs = np.arange(3, dtype=np.int32), np.zeros(2, np.float32)
        routed = np.zeros((2, 1, 1), np.int16)
        if rank == 5:  # the second rank of generator 2
            ids[1] += fault == "token"
            log_probs[0] += fault == "log-prob"
            routed[1] -= fault == "expert"
        kept = KeptIds.of([ids[1:2], ids[1:3] + np.array([0, rank == 5 and fault == "kept"])])
        sample = TrainingSample(ids, 1, 0.0, log_probs, routed, rank // 2, kept=kept)
        try:
            exchange.index([] if fault == "sample" and rank == 5 else [sample])
        except R1MegaError as error:
            found.append(f"{fault}: {error}")
    return found


class CountingScorer:
    """Rewards say which rank has scored; `flush` takes all ranks of a generator where there is a group. fails: the responses
    that one of these ranks cannot score, by where that shows.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, fails: Mapping[str, str] = MappingProxyType({})) -> None:
        self.texts: list[str] = []
        self._group, self._fails = group, fails

    def submit(self, prompt: Prompt, response: Response, text: str) -> int:
        self._check("submit", text)
        self.texts.append(text)
        return len(self.texts) - 1

    def flush(self) -> None:
        if self._group is not None:  # the policy as judge
            dist.all_reduce(torch.ones(1), group=self._group)

    def result(self, ticket: int) -> Reward:
        self._check("result", self.texts[ticket])
        return Reward(float(dist.get_rank()), {}, RewardStatus.OK, self.texts[ticket])

    def _check(self, where: str, text: str) -> None:
        if self._fails.get(where) == text:
            raise RewardError(f"{text} cannot be scored, says {where}")


def run_scoring(tp: int) -> dict[str, Any]:
    """What a generator of tp ranks scores here, the rewards of two rounds, and how errors of one rank end."""
    found: dict[str, Any] = {}
    group = dist.new_subgroups(tp)[0]
    last = dist.get_rank() % tp == tp - 1
    for everywhere in (False, True):
        scorer = CountingScorer(group if everywhere else None)
        shared = share_scoring(scorer, tp, everywhere=everywhere)
        rewards = [
            score for texts in ("abcde", "fga") for score in _scored(shared, texts, backwards=last and not everywhere)
        ]
        found[f"everywhere={everywhere}"] = (list(scorer.texts), rewards)
        if tp > 1:
            for where in ("submit", "result"):
                fails = {where: "b"} if last or not everywhere else {}
                failing = share_scoring(CountingScorer(group if everywhere else None, fails), tp, everywhere=everywhere)
                found[f"{where}, everywhere={everywhere}"] = _error(failing, "abc")
            shared = share_scoring(CountingScorer(), tp, everywhere=everywhere)
            found[f"unequal, everywhere={everywhere}"] = _error(shared, "abd" if last else "abc")
    scorer = CountingScorer()  # as an evaluation grades: four may wait
    work = [(Prompt(text, "q", ("1",), "math", None, (1,)), Sample(text, 0, text, 1, False)) for text in "abcdefghijk"]
    graded = grade_samples(share_scoring(scorer, tp), work, max_ungraded=4)
    told = [(one.sample.text, one.reward.reason) for one in graded]
    found["evaluated"] = scorer.texts, told
    if tp > 1:
        shared = share_scoring(CountingScorer(), tp, everywhere=True)
        found["order"] = _error(shared, "ba" if last else "ab")
    return found


def _scored(shared: Scorer, texts: str, *, backwards: bool = False) -> list[tuple[float, str]]:
    """backwards: as they are finished on this rank."""
    prompt = Prompt("p", "q", ("1",), "math", None, (1,))
    order = sorted(range(len(texts)), reverse=backwards)
    tickets = {i: shared.submit(prompt, Response((ord(texts[i]),), (0.0,), "stop"), texts[i]) for i in order}
    shared.flush()
    rewards = [shared.result(tickets[i]) for i in range(len(texts))]
    return [(reward.value or 0.0, reward.reason) for reward in rewards]


def _error(shared: Scorer, texts: str) -> str:
    try:
        _scored(shared, texts)
    except R1MegaError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def run_memory(num_samples: int, response: int, layers: int) -> tuple[float, float]:
    """(bytes by which this rank's memory grew from what it makes to its microbatches, at most; the estimate), on as many
    replicas and generators as there are ranks.
    """
    groups.init_distributed()
    rank, world = dist.get_rank(), dist.get_world_size()
    routing, columns = Routing(64, 8), tuple(range(layers))
    places = [RankPlace(other, other, columns) for other in range(world)]
    policy = SimpleNamespace(replica=rank, num_replicas=world, microbatch_multiple=1, min_microbatches=1)
    config = RLStage(
        stage="zero", run_dir=Path("unused"), model=ModelConfig(path=Path("unused")), data=DataConfig(prompts=()),
        update=UpdateConfig(num_minibatches=2, microbatch_tokens=8192),
    )  # fmt: skip
    numbers, prompt = np.random.default_rng(rank), Prompt("p", "q", ("1",), "math", None, tuple(range(64)))

    def respond(length: int) -> Response:
        routed = numbers.integers(0, 64, (63 + length, layers, 8), dtype=np.uint8)
        ids = numbers.integers(1000, 1 << 17, length).tolist()
        return Response(tuple(ids), tuple(numbers.normal(size=length).tolist()), "stop", routed)

    def step(count: int, length: int) -> object:
        made = tuple(respond(length + 7 * i) for i in range(count // world))
        rewards = tuple(Reward(float(i % 2), {}, RewardStatus.OK) for i in range(len(made)))
        group = RolloutGroup(prompt, made, ("text" * length,) * len(made), rewards, 0, slot=rank)
        samples = SampleExchange(places, routing, BUFFER).index(training_samples([group], config.algorithm))
        return group, samples, _plan(samples, config, 1, policy)

    step(2 * world, 64)  # what is loaded at first use
    gc.collect()
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    before = _status("VmRSS")
    kept = step(num_samples, response)
    grown = _status("VmHWM") - before
    tokens = sum(sample.num_tokens for sample in kept[1].known)
    sizes = Sizes(world, world, 1, 1, 8, 8, layers, layers, BUFFER)
    groups.destroy()
    return grown, sample_memory(num_samples, tokens, tokens - 64 * num_samples, sizes).peak


def _status(name: str) -> int:
    """Bytes, of this process."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def _maker(case: Case, sample: TrainingSample) -> int:
    return next(number for number, part in enumerate(case.made) if any(sample is one for one in part))


def _equal(found: TrainingSample, truth: TrainingSample, case: Case, rank: int) -> bool:
    """In all that a rank reads; whole, where its generator has made it."""
    if found.token_ids.dtype != np.int32:
        return False
    tokens, log_probs, positions = case.read(rank, truth)
    if _maker(case, truth) == case.place(rank).generator:
        tokens, log_probs = list(range(truth.num_tokens)), list(range(truth.response_length))
        positions = tokens[:-1]
    routed = truth.routed_experts
    if routed is not None:
        routed = routed[:, list(case.place(rank).columns)]
        if found.routed_experts.dtype != routed.dtype or found.routed_experts.shape != routed.shape:
            return False
        if not np.array_equal(found.routed_experts[positions], routed[positions]):
            return False
    kept = truth.kept if log_probs else None
    if found.summary() != dataclasses.replace(truth, kept=kept).summary():
        return False
    if kept is not None and not all(
        np.array_equal(*pair) for pair in ((found.kept.counts, kept.counts), (found.kept.ids, kept.ids))
    ):
        return False
    return np.array_equal(found.token_ids[tokens], truth.token_ids[tokens]) and np.array_equal(
        found.sampler_log_probs[log_probs], truth.sampler_log_probs[log_probs]
    )
