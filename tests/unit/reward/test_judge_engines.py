"""The judge through real generators: the colocated one, and vLLM's own OpenAI server in another process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from r1mega.config.rewards import FormatReward, JudgeReward, RewardConfig
from r1mega.data.tokenizer import load_tokenizer
from r1mega.reward.compose import RewardScorer
from r1mega.types import Prompt, Response, RewardStatus
from tests.unit.reward.judge_model import write_judge

pytestmark = pytest.mark.heavy

TEXTS = ["<think> a </think> poem good", "<think> a </think> poem bad", "<think> a </think> poem fine", "poem good"]
START_SECONDS = 900.0


@pytest.fixture(scope="module")
def judge_directory(tmp_path_factory):
    return write_judge(tmp_path_factory.mktemp("judge"))


def judged(texts, generator=None, tokenizer=None, **keys):
    keys = {"weight": 1.0, "verdict": "yes_no", "prompt": "rate {{ response }}", "max_tokens": 4, "votes": 3, **keys}
    config = RewardConfig(format=FormatReward(weight=0.0), judge=JudgeReward(**keys))
    with RewardScorer(config, max_response_tokens=64, engine=generator, tokenizer=tokenizer) as scorer:
        prompt = Prompt("p6", "Write a poem.", (), "general", "en", (1,))
        tickets = [scorer.submit(prompt, Response((1,), (0.0,), "stop"), text) for text in texts]
        return [scorer.result(ticket) for ticket in tickets]


def check(rewards):
    assert [reward.value for reward in rewards] == [1.0, 0.0, None, 1.0]
    assert rewards[2].status is RewardStatus.UNJUDGED and "hm" in rewards[2].reason
    assert "3 of 3 votes agree" in rewards[0].reason


def test_the_colocated_generator(judge_directory):
    from r1mega.rollout.engine import EngineSettings
    from r1mega.rollout.transformers_engine import TransformersEngine

    engine = TransformersEngine(EngineSettings(judge_directory, max_model_len=24, weights="checkpoint"))
    tokenizer = load_tokenizer(judge_directory)
    try:
        check(judged(TEXTS, engine, tokenizer, engine="policy"))
        good, long = judged(["poem good", "poem " * 30 + "good"], engine, tokenizer, engine="policy")
        assert good.value == 1.0, "a question that is too long fails alone"
        assert long.value is None and long.status is RewardStatus.FAILED and "max_model_len" in long.reason
    finally:
        engine.close()


class Generator:
    """Says yes; counts how often it is asked."""

    def __init__(self, tokenizer):
        self.reply, self.calls = Response(tuple(tokenizer.encode("Verdict: yes")), (), "stop"), 0

    def generate(self, requests):
        self.calls += 1
        return [(self.reply,) for _ in requests]


def test_the_policy_is_asked_in_flush_and_by_no_result(judge_directory):
    """So that ranks of one generator ask it together, and what fails on one of them fails before or after."""
    tokenizer = load_tokenizer(judge_directory)
    generator = Generator(tokenizer)
    judge = JudgeReward(weight=1.0, engine="policy", verdict="yes_no", prompt="rate {{ response }}", max_tokens=4)
    config = RewardConfig(format=FormatReward(weight=0.0), judge=judge)
    with RewardScorer(config, max_response_tokens=64, engine=generator, tokenizer=tokenizer) as scorer:
        scorer.flush()
        assert generator.calls == 0
        prompt = Prompt("p6", "Write a poem.", (), "general", "en", (1,))
        tickets = [scorer.submit(prompt, Response((1,), (0.0,), "stop"), text) for text in TEXTS]
        assert generator.calls == 0
        scorer.flush()
        assert generator.calls == 1
        assert all(scorer.result(ticket) for ticket in tickets)
        assert generator.calls == 1


@pytest.fixture
def server(judge_directory, tmp_path):
    """vLLM's OpenAI server on that model; ended with everything it started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path / "server.log").open("w")
    process = subprocess.Popen(
        [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(judge_directory),
            "--port", str(port), "--host", "127.0.0.1", "--served-model-name", "judge",
            "--max-model-len", "64", "--dtype", "float32",
            "--enforce-eager", "--max-num-seqs", "8",
        ],
        env=os.environ
        | {
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else to the first core, busy or not
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        },
        stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        _await(url, process, tmp_path / "server.log")
        yield f"{url}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.close()


def _await(url, process, log):
    """One client asks: each that is made reads all certificates, and one a question took a quarter of the test's CPU time."""
    limit = time.monotonic() + START_SECONDS
    with httpx.Client(trust_env=False) as client:
        while time.monotonic() < limit and process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if client.get(f"{url}/health").status_code == 200:
                    return
            time.sleep(0.2)
    pytest.fail(f"the server did not come up (status {process.poll()}):\n{log.read_text()[-4000:]}")


@pytest.mark.slow
def test_a_real_openai_server(server):
    check(judged(TEXTS, url=server, model="judge"))
    (missing,) = judged(TEXTS[:1], url=server, model="nobody")
    assert missing.status is RewardStatus.FAILED and "status 404" in missing.reason and "1 attempts" in missing.reason
    (long,) = judged(["poem " * 80 + "good"], url=server, model="judge")
    assert long.status is RewardStatus.FAILED and "status 400" in long.reason


def test_the_token_that_ends_a_response_is_no_part_of_its_text(judge_directory):
    from r1mega.data.tokenizer import response_text

    tokenizer = load_tokenizer(judge_directory)
    whole = tuple(tokenizer.encode("rate poem good")) + (tokenizer.eos_token_id,)
    assert response_text(tokenizer, Response(whole, (0.0,) * 4, "stop")).split() == ["ratepoemgood"]
    assert response_text(tokenizer, Response(whole[:2], (0.0,) * 2, "length")) == "ratepoem"
    assert response_text(tokenizer, Response((), (), "length")) == ""
