"""When a job of the launch scripts starts its ranks again, or goes back to the queue: the script itself, with programs in the place
of Slurm's that do what they are told, so that no Slurm is needed.
"""

import os
import subprocess
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCONTROL = """#!/bin/bash
case "$1 $2" in
"show hostnames") [ "$3" = "n[0-2]" ] && printf 'n0\\nn1\\nn2\\n' || echo "$3" ;;
"show node") echo "NodeName=$4 NodeAddr=address-of-$4 Port=1" ;;
"show job") echo "JobId=7 EndTime=$(date -d "@$END" +%FT%T) " ;;
*) echo "$*" >> "$DIRECTORY/asked" ;;
esac
"""
DECIDE = """#!/bin/bash
[ "$1 $2 $3" = "-m r1mega.observe.restarts $DIRECTORY/run" ] && [ "$4" != 85 ] && [ -e "$DIRECTORY/newer" ] || exit 1
[ $# = 3 ] || { rm "$DIRECTORY/newer"; echo "$SECONDS_TO_WAIT"; }
"""
SRUN = """#!/bin/bash
echo "$MASTER_ADDR ${@: -1} $*" >> "$DIRECTORY/starts"
n=$(wc -l < "$DIRECTORY/starts")
. "$DIRECTORY/ranks.sh"
"""


@pytest.fixture
def job(tmp_path):
    """Runs `run_in_job` on three machines of which so many are spare; what the ranks do is a script, $n the number of the start,
    `save` leaves a newer checkpoint.
    """
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (
        ("scontrol", SCONTROL),
        ("srun", SRUN),
        ("python", DECIDE),
        ("scancel", '#!/bin/bash\necho "$*" >> "$DIRECTORY/asked"\n'),
    ):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    def run(ranks, *, spare=0, end=10**10, meanwhile=lambda process: None, **variables):
        (tmp_path / "ranks.sh").write_text("save() { touch $DIRECTORY/newer; }\n"
                                           f"echo $DIRECTORY/run > $R1MEGA_SAY_RUN_DIR\n{ranks}\n")  # fmt: skip
        outside = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "R1MEGA_", "MASTER_"))
        }
        environment = outside | {
            "PATH": f"{programs}:{os.environ['PATH']}", "DIRECTORY": str(tmp_path), "END": str(int(end)), "R1MEGA_PYTHON": "python",
            "SECONDS_TO_WAIT": "0", "R1MEGA_LOGS": str(tmp_path / "logs"), "R1MEGA_SPARE_NODES": str(spare), "SLURM_JOB_ID": "7",
            "SLURM_JOB_NAME": "zero", "SLURM_JOB_NODELIST": "n[0-2]", "SLURM_NTASKS_PER_NODE": "8",
        }  # fmt: skip
        command = ". launch/slurm.sh; run_in_job $(rank_launcher) train"
        with open(tmp_path / "said", "w") as said:
            process = subprocess.Popen(
                ["bash", "-c", command], env=environment | variables, cwd=REPOSITORY, stdout=said, stderr=said
            )
            meanwhile(process)
            code = process.wait(60)
        asked = (tmp_path / "asked").read_text().splitlines() if (tmp_path / "asked").exists() else []
        return code, (tmp_path / "starts").read_text().splitlines(), asked, (tmp_path / "said").read_text()

    return run


KILLED = 'echo "srun: error: n1: task 9: Killed" >&2; exit 137'


def test_a_rank_that_died_is_left_for_a_spare_machine(job):
    code, starts, _, said = job(f"[ $n = 1 ] || exit 0; save; {KILLED}", spare=1)
    assert code == 0, said
    first, second = starts
    assert "--nodes=2 --ntasks=16 --nodelist=n0,n1" in first and "--nodelist=n0,n2" in second
    assert "launch: rank 9 failed first (Killed); see " in said and "starting again in 0 s, without n1" in said


def test_the_first_rank_goes_to_the_first_machine_that_is_left(job):
    ranks = '[ $n = 1 ] || exit 0; save; echo "srun: error: Node failure on n0" >&2; echo "srun: error: n0: task 0: Killed" >&2; exit 137'
    _, starts, _, said = job(ranks, spare=1)
    assert [line.split()[0] for line in starts] == ["address-of-n0", "address-of-n1"], said


def test_without_a_spare_machine_it_starts_on_the_same_ones(job):
    code, starts, _, said = job(f"[ $n = 1 ] || exit 0; save; {KILLED}")
    assert (code, len(starts)) == (0, 2), said
    assert "--nodelist" not in starts[0] and starts[0] == starts[1]


@pytest.mark.parametrize(
    ("ranks", "code", "num_starts"),
    [
        (KILLED, 137, 1),
        (f"[ $n = 1 ] && save; {KILLED}", 137, 2),
        ('echo "srun: error: n1: task 9: Exited with exit code 3" >&2; exit 3', 3, 1),
        ("save; exit 85", 85, 1),
    ],
    ids=["no checkpoint", "no newer one", "not decided so", "saved"],
)
def test_when_it_does_not(job, ranks, code, num_starts):
    ended, starts, asked, said = job(ranks)
    assert (ended, len(starts)) == (code, num_starts), said
    assert asked == (["requeue 7"] if code == 85 else [])


def signalled(directory, name):
    def send(process):
        limit = time.monotonic() + 30
        while not (directory / "starts").exists() and time.monotonic() < limit:
            time.sleep(0.02)
        time.sleep(0.3)
        process.send_signal(getattr(__import__("signal"), name))

    return send


def test_a_step_longer_than_the_warning_goes_back_to_the_queue_before_the_limit(job, tmp_path):
    began = time.time()
    code, starts, asked, said = job(
        "save; sleep 50", end=began + 30, R1MEGA_LAST_SECONDS="28", meanwhile=signalled(tmp_path, "SIGUSR1")
    )
    assert (code, len(starts), asked) == (85, 1, ["--signal=USR2 7", "requeue 7"]), said
    assert time.time() - began < 50 and "longer than the warning" in said


def test_but_not_where_nothing_was_kept(job, tmp_path):
    code, _, asked, said = job(
        "sleep 6; exit 1", end=time.time() + 3, R1MEGA_LAST_SECONDS="2", meanwhile=signalled(tmp_path, "SIGUSR1")
    )
    assert (code, asked) == (1, ["--signal=USR2 7"]), said
    assert "the time limit comes before the first checkpoint" in said


def test_cancelled_while_it_waits_it_stays_down(job, tmp_path):
    code, starts, asked, said = job(f"save; {KILLED}", SECONDS_TO_WAIT="50", meanwhile=between_starts(tmp_path))
    assert (code, len(starts)) == (85, 1), said
    assert asked == ["--signal=USR2 7"] and "cancelled, so it stays down" in said


def between_starts(directory):
    def send(process):
        limit = time.monotonic() + 30
        while "starting again" not in (directory / "said").read_text() and time.monotonic() < limit:
            time.sleep(0.02)
        process.terminate()

    return send
