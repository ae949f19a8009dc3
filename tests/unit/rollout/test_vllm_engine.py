"""The real vLLM engine on tiny models, against transformers."""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from r1mega.errors import GenerationError
from r1mega.platform import groups
from r1mega.rollout import kept
from r1mega.rollout.engine import sample_seed
from r1mega.rollout.transformers_engine import TransformersEngine
from r1mega.rollout.vllm_engine import VllmEngine
from r1mega.types import UNFINISHED, Cut, GenerationRequest, SamplingSettings
from r1mega.weights.transfer import checkpoint_tensors
from tests.unit.rollout.tiny_models import (
    MAX_MODEL_LEN,
    MODELS,
    checkpoint,
    greedy_requests,
    hf_logits,
    prompt,
    reference_kept,
    reference_log_probs,
    reference_routing,
    sampled_requests,
    settings,
)

pytestmark = pytest.mark.heavy

TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def character_tokenizer(tmp_path_factory):
    """Token i is the i-th printable character; '>' + '\\n' is one token, so that no stop text is a token alone."""
    vocabulary = {chr(33 + i): i for i in range(94)} | {">\n": 94, "<unk>": 95}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    directory = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def engines(character_tokenizer):
    """Engines by model name, each built once."""
    groups.init_distributed()
    torch.set_num_threads(1)
    built = {}

    def get(name: str, **changes) -> VllmEngine:
        key = (name, *changes.items())
        if key not in built:
            built[key] = VllmEngine(settings(name, tokenizer_path=character_tokenizer, **changes))
        return built[key]

    yield get
    for engine in built.values():
        engine.close()
    groups.destroy()


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_equal_transformers(engines, name):
    engine = engines(name)
    requests = [*greedy_requests(3), *sampled_requests(3), *sampled_requests(2, temperature=0.7, top_p=0.8)]
    for request, responses in zip(requests, engine.generate(requests), strict=True):
        assert len(responses) == request.num_samples
        for response in responses:
            expected = reference_log_probs(name, request, response.token_ids)
            assert np.abs(expected - response.log_probs).max() <= TOLERANCE
            sequence = (*request.prompt_token_ids, *response.token_ids)
            logits = hf_logits(name, sequence)[:-1].log_softmax(-1)
            expected = logits[range(len(sequence) - 1), sequence[1:]].numpy()
            (found,) = engine.prompt_log_probs([sequence])
            assert np.abs(expected - found).max() <= TOLERANCE


CUTS = [{"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.1}, {"top_p": 0.9, "top_k": 20, "min_p": 0.02}, {"max_kept": 3}]


@pytest.mark.parametrize("built", ["vllm", "transformers"])
def test_kept_ids_are_what_was_drawn_from(engines, built):
    """And the log-probs are over them: of float64 logits, id by id. To record them changes nothing."""
    name = "qwen3_tied"
    engine = engines(name) if built == "vllm" else TransformersEngine(settings(name))
    for seed, cut in enumerate(CUTS):
        (plain,) = sampled_requests(1, seed=seed, max_tokens=12, temperature=0.7, **cut)
        request = replace(plain, sampling=replace(plain.sampling, max_kept=cut.get("max_kept", 96)))
        (before,), (responses,) = engine.generate([plain]), engine.generate([request])
        assert before == responses and all((r.kept is None) == ("max_kept" not in cut) for r in before)
        for response in responses:
            sequence = (*request.prompt_token_ids, *response.token_ids)
            rows = (hf_logits(name, sequence)[len(request.prompt_token_ids) - 1 : -1] / 0.7).softmax(-1).numpy()
            lists = np.split(response.kept.ids, response.kept.counts.cumsum()[:-1])
            for row, token, log_prob, ids in zip(rows, response.token_ids, response.log_probs, lists, strict=True):
                kept, near = reference_kept(row, request.sampling)
                assert token in ids and (np.diff(ids) > 0).all()
                assert set(ids.tolist()) ^ kept <= near
                assert log_prob == pytest.approx(np.log(row[token] / row[ids].sum()), abs=TOLERANCE)


@pytest.mark.parametrize("built", ["vllm", "transformers"])
def test_ids_that_are_all_as_likely_as_the_last_are_kept_or_more_than_can_be(engines, monkeypatch, built):
    settled = settings("llama", weights="empty")
    engine = engines("llama", weights="empty") if built == "vllm" else TransformersEngine(settled)
    engine.update_weights((n, torch.zeros_like(t)) for n, t in checkpoint_tensors(checkpoint("llama")))
    cuts: list[dict[str, int]] = [{"max_kept": 48}, {"max_kept": 47, "top_k": 2}]
    for cut in cuts:
        ((response, *_),) = engine.generate(sampled_requests(1, max_tokens=1, **cut))
        assert response.kept.counts == [96] and response.log_probs[0] == pytest.approx(-np.log(96))
    monkeypatch.setattr(kept, "TIES", 1)
    with pytest.raises(GenerationError, match=r"at least 94 ids .* rollout\.max_kept_ids = 47 allows"):
        engine.generate(sampled_requests(1, max_tokens=1, max_kept=47))
    with pytest.raises(GenerationError, match="min_p=1.0"):
        engine.generate(sampled_requests(1, min_p=1.0))


@pytest.mark.parametrize("name", ["deepseek", "kimi_k2", "qwen3_tied", "qwen3_moe"])
def test_greedy_tokens_equal_the_transformers_engine(engines, name):
    other = TransformersEngine(settings(name))
    ours, theirs = engines(name).generate(greedy_requests()), other.generate(greedy_requests())
    assert [r[0].token_ids for r in ours] == [r[0].token_ids for r in theirs]
    assert [r[0].finish_reason for r in ours] == ["length"] * len(ours)


def test_a_kimi_k2_leaves_transformers_its_deepseek_v3(engines):
    from transformers import DeepseekV3Config

    engines("kimi_k2")
    assert DeepseekV3Config.model_type == DeepseekV3Config().model_type == "deepseek_v3"


def test_bfloat16_and_an_engine_without_weights(engines):
    engine = engines("qwen3_tied", dtype="bfloat16", weights="empty")
    with pytest.raises(GenerationError, match="no weights"):
        engine.generate(greedy_requests(1))
    engine.update_weights(checkpoint_tensors(checkpoint("qwen3_tied")))
    for request, (response,) in zip(greedy_requests(3), engine.generate(greedy_requests(3)), strict=True):
        expected = reference_log_probs("qwen3_tied", request, response.token_ids)
        assert np.abs(expected - response.log_probs).mean() <= 0.05


@pytest.mark.parametrize("name", ["deepseek", "llama"])
def test_a_seed_determines_a_response_in_any_batch(engines, name):
    engine = engines(name)
    alone = engine.generate(sampled_requests(4)[2:3])[0]
    together = engine.generate(list(reversed(sampled_requests(4))))[1]
    assert [r.token_ids for r in alone] == [r.token_ids for r in together]
    first_sample = engine.generate([GenerationRequest(prompt(2), 1, 2, SamplingSettings(max_tokens=24))])[0][0]
    assert first_sample.token_ids == alone[0].token_ids
    other_seed = engine.generate(sampled_requests(4, seed=100)[2:3])[0]
    assert len({r.token_ids for r in (*alone, *other_seed)}) == 6


def test_neighbouring_seeds_share_no_stream():
    seeds = [sample_seed(seed, index) for seed in range(200) for index in range(16)]
    assert len(set(seeds)) == len({seed % 2**32 for seed in seeds}) == 3200
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_samples_follow_the_distribution(engines):
    """Chi-square of 4096 first tokens against the reported log-probs, which other tests hold against transformers."""
    engine = engines("llama")
    request = GenerationRequest(prompt(3), 4096, 11, SamplingSettings(temperature=0.5, top_p=0.9, max_tokens=1))
    (responses,) = engine.generate([request])
    counts = np.bincount([r.token_ids[0] for r in responses], minlength=96)
    log_prob = {r.token_ids[0]: r.log_probs[0] for r in responses}
    probabilities = np.zeros(96)
    for token, value in log_prob.items():
        probabilities[token] = np.exp(value)
    assert probabilities.sum() == pytest.approx(1, abs=0.01)  # nearly every token of the nucleus was drawn
    likely = probabilities * 4096 >= 5
    statistic = ((counts - probabilities * 4096) ** 2 / (probabilities * 4096 + 1e-9))[likely].sum()
    degrees = likely.sum() - 1
    assert statistic < degrees + 5 * np.sqrt(2 * degrees)  # five standard deviations


def go_on(request, index, done):
    """The request for the rest of a response that was left unfinished."""
    return replace(request, num_samples=1, first_sample=index, begun=done.response.token_ids)


def test_a_cut_leaves_what_is_unfinished_and_it_goes_on_from_there(engines):
    """The tokens before the cut are those of an uncut stream, and all log-probs transformers'; sixteen tokens, four at a time."""
    engine, requests = engines("deepseek"), sampled_requests(3, num_samples=2, max_tokens=16)
    whole = [response for responses in engine.generate(requests) for response in responses]
    asked = []
    cut = Cut(4, lambda fewest: asked.append(fewest) or fewest >= 8)
    first = sorted(engine.stream(requests, cut), key=lambda done: (done.request_index, done.sample_index))
    assert [done.response.finish_reason for done in first] == [UNFINISHED] * 6 and asked == sorted(asked)
    assert asked[-1] == min(len(done.response.token_ids) for done in first) >= 8 > asked[-2]
    for done, uncut in zip(first, whole, strict=True):
        assert done.response.token_ids == uncut.token_ids[: len(done.response.token_ids)]
    rest = [go_on(requests[done.request_index], done.sample_index, done) for done in first]
    (fresh,) = engine.generate([replace(requests[1], num_samples=1, first_sample=1)])[0]
    assert fresh.token_ids == whole[3].token_ids
    for request, done, (response,) in zip(rest, first, engine.generate(rest), strict=True):
        tokens = done.response.token_ids + response.token_ids
        log_probs = done.response.log_probs + response.log_probs
        assert len(tokens) == 16 and response.finish_reason == "length"
        expected = reference_log_probs("deepseek", request, tokens)
        assert np.abs(expected - log_probs).max() <= TOLERANCE
    with pytest.raises(GenerationError, match="goes on from 16 tokens"):
        engine.generate([replace(rest[0], begun=rest[0].begun[:1] * 16)])


def test_a_stop_string_may_lie_across_a_cut(engines):
    engine = engines("llama")
    request = sampled_requests(1, num_samples=1)[0]
    (free,) = engine.generate([request])[0]
    text = "".join(chr(33 + token) for token in free.token_ids[:4])
    stopping = replace(request.sampling, stop_strings=(text[-2:],))
    (again,) = engine.generate([replace(request, sampling=stopping)])[0]
    assert again.finish_reason == "stop"
    begun = again.token_ids[:-1]
    seeds = range(400)
    tries = [
        replace(request, sampling=replace(stopping, max_tokens=len(begun) + 1), begun=begun, seed=s) for s in seeds
    ]
    found = [response for (response,) in engine.generate(tries)]
    assert any(response.token_ids == again.token_ids[-1:] for response in found)
    assert all((r.token_ids == again.token_ids[-1:]) == (r.finish_reason == "stop") for r in found)


def test_stop_token_ends_and_belongs_to_the_response(engines):
    engine = engines("llama")
    (free,) = engine.generate(sampled_requests(1, num_samples=4))
    stop = free[0].token_ids[10]
    (stopped,) = engine.generate(sampled_requests(1, num_samples=4, stop_token_ids=(stop,)))
    for before, after in zip(free, stopped, strict=True):
        if stop in before.token_ids:
            cut = before.token_ids.index(stop) + 1
            assert (after.token_ids, after.finish_reason) == (before.token_ids[:cut], "stop")
            assert len(after.log_probs) == cut
        else:
            assert (after.token_ids, after.finish_reason) == (before.token_ids, "length")
    assert stopped[0].finish_reason == "stop"


def test_stop_string_over_several_tokens(engines):
    engine = engines("llama")
    (free,) = engine.generate(sampled_requests(1, num_samples=4))
    text = "".join(chr(33 + token) if token < 94 else ">\n" for token in free[0].token_ids[:12])
    for stop, length in ((text[6:9], 9), (text[3:12], 12), (text[5], 1 + text.index(text[5]))):
        (stopped,) = engine.generate(sampled_requests(1, num_samples=4, stop_strings=(stop, "never this")))
        assert stopped[0].token_ids == free[0].token_ids[:length]
        assert stopped[0].log_probs == free[0].log_probs[:length]
        assert stopped[0].finish_reason == "stop"
        for before, after in zip(free[1:], stopped[1:], strict=True):
            assert after.token_ids == before.token_ids[: len(after.token_ids)]


def test_stop_string_inside_a_longer_token(engines):
    """The token '>\\n' completes '>': it ends the response although more text follows in it."""
    engine = engines("llama")
    stops = engine._stop_strings
    assert 94 in stops.candidates((">",)) and 94 in stops.candidates((">\n",))
    assert stops.matches([10, 94], (">",)) and stops.matches([10, 94], ("+>",))
    assert not stops.matches([94, 10], (">",))


def test_stream_yields_early_and_can_be_abandoned(engines):
    engine = engines("llama")
    long = GenerationRequest(prompt(0), 1, 0, SamplingSettings(max_tokens=90))
    short = GenerationRequest(prompt(1), 2, 1, SamplingSettings(max_tokens=2))
    expected = engine.generate([long, short])
    stream = engine.stream([long, short])
    first, second = next(stream), next(stream)
    assert (first.request_index, second.request_index) == (1, 1)
    assert {first.sample_index, second.sample_index} == {0, 1}
    for call in (engine.sleep, engine.close, lambda: engine.generate([short]), lambda: engine.update_weights([])):
        with pytest.raises(GenerationError, match="stream"):
            call()
    stream.close()
    assert engine.generate([long, short]) == expected


def test_more_samples_than_slots_and_a_full_cache(engines):
    """Samples wait for a slot, and are preempted when the KV cache is full; neither changes what they say."""
    roomy, tight = engines("deepseek"), engines("deepseek", max_num_seqs=8, kv_cache_bytes=MAX_MODEL_LEN * 2304 * 4 * 2)
    requests = sampled_requests(4, num_samples=5, max_tokens=80)
    assert [[r.token_ids for r in samples] for samples in roomy.generate(requests)] == [
        [r.token_ids for r in samples] for samples in tight.generate(requests)
    ]


def test_further_requests_come_when_there_is_room_and_change_nothing(engines):
    """Also to a stream that begins with none. Room is a free place where none waits for one."""
    engine = engines("deepseek", max_num_seqs=8, kv_cache_bytes=MAX_MODEL_LEN * 2304 * 4 * 2)
    requests = sampled_requests(4, num_samples=5, max_tokens=30)
    expected = {(i, n): r for i, samples in enumerate(engine.generate(requests)) for n, r in enumerate(samples)}
    scheduler = engine._core.engine_core.scheduler
    for first in (0, 1):
        further, asked = iter([*([request] for request in requests[first:]), []]), []

        def refill(further=further, asked=asked):
            asked.append((len(scheduler.running), len(scheduler.waiting)))
            return next(further)

        found = {(d.request_index, d.sample_index): d.response for d in engine.stream(requests[:first], None, refill)}
        assert {key: r.token_ids for key, r in found.items()} == {key: r.token_ids for key, r in expected.items()}
        assert len(asked) == 5 - first  # not again after the last
        assert all(running < 8 and not waiting for running, waiting in asked)
    with pytest.raises(GenerationError, match="max_tokens=0"):
        list(engine.stream([], None, lambda: [GenerationRequest((1,), 1, 0, SamplingSettings(max_tokens=0))]))
    assert engine.generate(requests[:1]) is not None  # nothing was left behind


@pytest.mark.parametrize("name", ["deepseek", "llama"])
def test_prompts_longer_than_a_pass(engines, name):
    """A budget of 16 tokens a pass, sequences of up to 127: tokens, log-probs and prompt log-probs are those of transformers,
    and a pass takes no more. (vLLM on a CPU does without chunks for latent attention, and raises the budget itself.)"""
    roomy, engine = engines(name), engines(name, max_batched_tokens=16, max_num_seqs=8)
    budget = engine._llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    assert budget == 16 if name == "llama" else budget >= MAX_MODEL_LEN
    sampling = SamplingSettings(max_tokens=20)
    requests = [GenerationRequest(prompt(95 + i), 2, i, sampling) for i in range(6)]
    passes, step = [], engine._core.engine_core.scheduler.schedule

    def schedule(*arguments, **options):
        output = step(*arguments, **options)
        passes.append(output.total_num_scheduled_tokens)
        return output

    engine._core.engine_core.scheduler.schedule = schedule
    try:
        for request, responses, others in zip(
            requests, engine.generate(requests), roomy.generate(requests), strict=True
        ):
            for response, other in zip(responses, others, strict=True):
                assert response.token_ids == other.token_ids  # a discarded draw leaves a seed's stream where it was
                expected = reference_log_probs(name, request, response.token_ids)
                assert np.abs(expected - response.log_probs).max() <= TOLERANCE
        sequence = prompt(120)
        expected = hf_logits(name, sequence)[:-1].log_softmax(-1)[range(len(sequence) - 1), sequence[1:]].numpy()
        (found,) = engine.prompt_log_probs([sequence])
        assert np.abs(expected - found).max() <= TOLERANCE
    finally:
        engine._core.engine_core.scheduler.schedule = step
    assert 0 < max(passes) <= budget


def test_a_prefix_cache_that_vllm_did_not_drop_is_an_error(engines):
    """It would answer with what older weights computed."""
    from vllm import SamplingParams

    engine = engines("llama")
    expected = engine.generate(greedy_requests(1))
    for call in (lambda: engine.generate(greedy_requests(1)), lambda: engine.prompt_log_probs([prompt(3)]), engine.sleep,
                 lambda: engine.update_weights(checkpoint_tensors(checkpoint("llama")))):  # fmt: skip
        left_open = engine._add(list(prompt(20)), SamplingParams(max_tokens=50, detokenize=False))
        next(engine._steps())
        with pytest.raises(GenerationError, match="prefix cache: 1 requests still hold blocks.*End every request"):
            call()
        engine._core.abort_requests([left_open])
        list(engine._steps())
    with pytest.raises(GenerationError, match="no weights"):
        engine.generate(greedy_requests(1))  # the last of them left none that count
    engine.update_weights(checkpoint_tensors(checkpoint("llama")))
    assert engine.generate(greedy_requests(1)) == expected


@pytest.mark.parametrize("name", ["deepseek", "llama"])
def test_sleep_frees_memory_and_changes_nothing(engines, name):
    engine = engines(name)
    before = engine.generate(greedy_requests())
    gc.collect()
    process = psutil.Process()
    awake = process.memory_info().rss
    engine.sleep()
    engine.sleep()
    freed = awake - process.memory_info().rss
    assert freed >= 200 << 20
    with pytest.raises(GenerationError, match="asleep"):
        engine.generate(greedy_requests())
    engine.wake_up()
    assert engine.generate(greedy_requests()) == before
    engine.sleep(keep_weights=False)
    engine.wake_up()
    with pytest.raises(GenerationError, match="no weights"):  # as where they are gone
        engine.generate(greedy_requests())
    engine.update_weights(checkpoint_tensors(checkpoint(name)))
    assert engine.generate(greedy_requests()) == before


def test_the_trainers_random_state_is_left_alone(engines):
    engine = engines("llama")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    engine.generate(sampled_requests(2))
    engine.prompt_log_probs([prompt(0)])
    assert torch.equal(torch.rand(3), expected)
    assert torch.set_num_threads.__module__ != "vllm.v1.worker.cpu_worker"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (GenerationRequest((), 1, 0, SamplingSettings()), "no tokens"),
        (GenerationRequest((3,) * MAX_MODEL_LEN, 1, 0, SamplingSettings()), "no room"),
        (GenerationRequest((3,) * 100, 1, 0, SamplingSettings(max_tokens=29)), "exceed"),
        (GenerationRequest((3, 96), 1, 0, SamplingSettings(max_tokens=5)), "vocabulary"),
        (GenerationRequest((3,), 0, 0, SamplingSettings(max_tokens=5)), "num_samples"),
        (GenerationRequest((3,), 1, 0, SamplingSettings(max_tokens=5, temperature=-1.0)), "temperature"),
        (GenerationRequest((3,), 1, 0, SamplingSettings(max_tokens=5, stop_strings=("",))), "empty"),
    ],
)
def test_bad_requests_are_refused(engines, request_, message):
    with pytest.raises(GenerationError, match=message):
        engines("llama").generate([request_])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen3_moe", {}),
        ("kimi_k2", {}),  # numbers of experts in two bytes
        ("deepseek", {}),
        ("deepseek", {"max_num_seqs": 2}),  # later samples of a prompt find it in the prefix cache
        ("deepseek", {"max_batched_tokens": 16, "max_num_seqs": 16, "max_model_len": 72}),  # prompts in several passes
        ("deepseek", {"kv_cache_bytes": 3 << 20, "max_num_seqs": 16}),  # too small: some are preempted, computed again
    ],
)
def test_routed_experts_equal_transformers(engines, name, changes):
    engine = engines(name, return_routed_experts=True, **changes)
    shared = prompt(30)  # 35 tokens: two blocks of the cache
    requests = [
        GenerationRequest((*shared, *prompt(i)[: 1 + i]), 3, i, SamplingSettings(max_tokens=24)) for i in range(4)
    ]
    for _ in range(2):  # the second call starts without the first one's cache
        for request, responses in zip(requests, engine.generate(requests), strict=True):
            for response in responses:
                tokens = (*request.prompt_token_ids, *response.token_ids)
                assert np.array_equal(np.sort(response.routed_experts), reference_routing(name, tokens[:-1]))
        engine.sleep()
        engine.wake_up()
