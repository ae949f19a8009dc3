"""Every attack beside an innocent neighbour: the host untouched, the attacker 0, the neighbour right.

R1MEGA_SANDBOX_REPEATS=100 runs each that many times, round by round.
"""

from __future__ import annotations

import os
import platform
import threading
import time

import pytest

from r1mega.reward.code_problem import AssertBlock, Problem
from r1mega.sandbox import Verdict
from r1mega.types import RewardStatus
from tests.unit.sandbox import sandbox_attacks
from tests.unit.sandbox.sandbox_attacks import BOMBS, Attack
from tests.unit.sandbox.sandbox_attacks_agent import AGENT

pytestmark = pytest.mark.heavy

ATTACKS = [*sandbox_attacks.ATTACKS, *AGENT]
REPEATS = int(os.environ.get("R1MEGA_SANDBOX_REPEATS", "1"))
NEIGHBOUR = """
import os, subprocess, tempfile, threading
NEIGHBOUR = "NEIGHBOUR"
def total(numbers):
    results = []
    threads = [threading.Thread(target=results.append, args=(n,)) for n in numbers]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    with tempfile.TemporaryFile() as file:
        file.write(bytes(1 << 20))
    assert subprocess.run(["/bin/sh", "-c", "exit 7"]).returncode == 7
    return sum(results)
"""
NEIGHBOUR_PROBLEM = Problem(
    assertions=AssertBlock("", "assert total([1, 2, 3, 4]) == 10"), entry="total", time_limit=60.0
)


def planted(attack: Attack, host) -> str:
    source = attack.source
    places = {"MARK": host.mark, "FILE": str(host.file), "PORT": str(host.port.getsockname()[1]), "ABSTRACT": host.mark}
    for placeholder, value in places.items():
        source = source.replace(placeholder, value)
    return source


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name.replace(" ", "-"))
@pytest.mark.parametrize("repeat", range(REPEATS))
def test_attack_scores_zero_beside_a_neighbour(attack, repeat, host, launcher, code_reward):
    if "syscall" in attack.source and platform.machine() != "x86_64":
        pytest.skip("system call numbers are those of x86-64")
    tests = (attack.tests or "assert solve() == 'GOLD'").replace("GOLD", host.gold)
    scored = {}

    def run(name, source, problem):
        scored[name] = code_reward.score(source, problem)

    # Only an attack on time needs to run into the limit; the others must not do so on a busy machine.
    seconds = 1.0 if Verdict.TIME_LIMIT in attack.verdicts else 60.0
    problem = Problem(assertions=AssertBlock("", tests), time_limit=seconds)
    attacker = threading.Thread(target=run, args=("attacker", planted(attack, host), problem))
    attacker.start()
    if attack in BOMBS:
        time.sleep(0.2)  # let it go off
    run("neighbour", NEIGHBOUR, NEIGHBOUR_PROBLEM)
    attacker.join()

    assert scored["attacker"].status is RewardStatus.OK, scored["attacker"]
    assert scored["attacker"].value == 0.0
    assert scored["attacker"].reason.split(":")[0] in attack.verdicts, scored["attacker"].reason
    assert scored["neighbour"].value == 1.0, scored["neighbour"]
    host.assert_untouched()


def test_the_gold_itself_would_pass(host, launcher, code_reward):
    """The attacks fail for lack of the gold, not for a task that nobody can pass."""
    problem = Problem(assertions=AssertBlock("", f"assert solve() == '{host.gold}'"))
    assert code_reward.score(f"def solve(*_):\n    return '{host.gold}'", problem).value == 1.0


def test_at_least_forty_attacks():
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) >= 40
