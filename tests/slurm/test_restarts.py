"""When a job of the launch scripts starts its ranks again, or goes back to the queue: the script itself, with programs in the place
of Slurm's that do what they are told, so that no Slurm is needed.
"""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCONTROL = """#!/bin/bash
case "$1 $2" in
"show hostnames") [ "$3" != broken ] || exit 1; names=${3/"n[0-2]"/n0,n1,n2} names=${names/"n[1-2]"/n1,n2}; echo "${names//,/$'\\n'}" ;;
"show node") [ ! -e "$DIRECTORY/slow" ] || { touch "$DIRECTORY/asks"; sleep 1; }; echo "NodeName=$4 NodeAddr=address-of-$4 Port=1" ;;
"show job") [ ! -e "$DIRECTORY/looks" ] || { head -n 1 "$DIRECTORY/looks"; sed -i 1d "$DIRECTORY/looks"; exit; }
    [ ! -e "$DIRECTORY/mute" ] || { rm "$DIRECTORY/mute"; exit 1; }; echo "JobId=7 EndTime=$(date -d "@$END" +%FT%T) $MORE" ;;
*) echo "$*" >> "$DIRECTORY/asked"; [ ! -e "$DIRECTORY/refused" ] ;;
esac
"""
DECIDE = """#!/bin/bash
[ "$1 $2 $3" = "-m r1mega.observe.restarts $DIRECTORY/run" ] && [ "$4" != 85 ] && [ "$4" != 143 ] && [ -e "$DIRECTORY/newer" ] || exit 1
[ $# = 3 ] || { rm "$DIRECTORY/newer"; echo "$SECONDS_TO_WAIT"; }
"""
SRUN = """#!/bin/bash
if [[ "$*" == *--overlap* ]]; then
    echo "${@:1:8}" >> "$DIRECTORY/guards"
    [ ! -e "$DIRECTORY/no guards" ] || { echo "srun: error: no step" >&2; exit 1; }
    exec sleep 60
fi
echo "$MASTER_ADDR ${@: -1} $* immediate=${SLURM_IMMEDIATE:-}" >> "$DIRECTORY/starts"
n=$(wc -l < "$DIRECTORY/starts")
. "$DIRECTORY/ranks.sh"
"""


@pytest.fixture
def stubs(tmp_path):
    """The environment of a job on three machines, with those programs in the place of Slurm's."""
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
    outside = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "R1MEGA_", "MASTER_"))
    }
    return outside | {
        "PATH": f"{programs}:{os.environ['PATH']}", "DIRECTORY": str(tmp_path), "R1MEGA_PYTHON": "python",
        "R1MEGA_LOGS": str(tmp_path / "logs"), "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "zero", "SLURM_JOB_NODELIST": "n[0-2]",
        "SLURM_NTASKS_PER_NODE": "8",
    }  # fmt: skip


@pytest.fixture
def bash(stubs, tmp_path):
    """Runs a function of the script alone; (exit code, what it asked Slurm for)."""

    def run(command, **variables):
        done = subprocess.run(["bash", "-c", f". launch/slurm.sh; {command}"], env=stubs | variables, cwd=REPOSITORY, timeout=30)  # fmt: skip
        asked = tmp_path / "asked"
        return done.returncode, asked.read_text().splitlines() if asked.exists() else []

    return run


@pytest.fixture
def job(stubs, tmp_path):
    """Runs `run_in_job` on three machines of which so many are spare; what the ranks do is a script, $n the number of the start,
    `save` leaves a newer checkpoint.
    """

    def run(ranks, *, spare=0, end=10**10, meanwhile=lambda process: None, stages=1, **variables):
        (tmp_path / "ranks.sh").write_text("save() { touch $DIRECTORY/newer; }\n"
                                           f"[ -e $DIRECTORY/silent ] || echo $DIRECTORY/run > $R1MEGA_SAY_RUN_DIR\n{ranks}\n")  # fmt: skip
        job = {"END": str(int(end)), "SECONDS_TO_WAIT": "0", "R1MEGA_SPARE_NODES": str(spare)}
        command = (
            ". launch/slurm.sh; SECONDS_BETWEEN_REMINDERS=1 SECONDS_BETWEEN_LOOKS=1"
            + "; run_in_job $(rank_launcher) train" * stages
        )
        with open(tmp_path / "said", "w") as said:
            process = subprocess.Popen(
                ["bash", "-c", command], env=stubs | job | variables, cwd=REPOSITORY, stdout=said, stderr=said
            )
            meanwhile(process)
            code = process.wait(60)
        asked, starts = (
            path.read_text().splitlines() if path.exists() else [] for path in (tmp_path / "asked", tmp_path / "starts")
        )
        return code, starts, list(dict.fromkeys(asked)), (tmp_path / "said").read_text()  # reminders once

    return run


KILLED = 'echo "srun: error: n1: task 9: Killed" >&2; exit 137'


def test_a_rank_that_died_is_left_for_a_spare_machine(job):
    code, starts, _, said = job(f"[ $n = 1 ] || exit 0; save; {KILLED}", spare=1)
    assert code == 0, said
    first, second = starts
    assert "--nodes=2 --ntasks=16 --nodelist=n0,n1" in first and "--nodelist=n0,n2" in second
    assert "launch: rank 9 failed first (Killed); see " in said and "starting again in 0 s, without n1" in said


@pytest.mark.parametrize(
    ("by", "first"),
    [("Killed", 137), ("Out Of Memory", 137), ("Segmentation fault (core dumped)", 139), ("Aborted", 134), ("User defined signal 2", 140)],
)  # fmt: skip
def test_it_is_the_code_of_the_rank_that_died_first_that_decides(job, by, first):
    """And not the highest, srun's own: of one that was terminated for it before it could end by itself."""
    ranks = f"[ $n = 1 ] || exit 0; save; {KILLED}".replace("Killed", by).replace(
        "exit 137", 'echo "srun: error: n2: task 17: Terminated" >&2; exit 143'
    )
    code, starts, _, said = job(ranks)
    assert (code, len(starts)) == (0, 2), said
    assert f"rank 9 failed first ({by})" in said and f"exit code {first}, and a newer checkpoint" in said


def killed(*nodes, lost=""):
    """Ranks of the start k die on machine k of those; `lost` at the first."""
    lines = [
        f'[ $n = {k} ] && {{ save; echo "srun: error: {n}: task 0: Killed" >&2; exit 137; }}'
        for k, n in enumerate(nodes, 1)
    ]
    if lost:
        lines.insert(0, f'[ $n = 1 ] && echo "srun: error: Node failure on {lost}" >&2')
    return "\n".join([*lines, "exit 0"])


@pytest.mark.parametrize(
    ("spare", "ranks", "machines"),
    [
        (0, killed("n0"), ["n0,n1,n2", "n0,n1,n2"]),
        (1, killed("n0"), ["n0,n1", "n1,n2"]),
        (1, killed("n0", "n2"), ["n0,n1", "n1,n2", "n1,n2"]),
        (1, killed("n1", "n0"), ["n0,n1", "n0,n2", "n0,n2"]),
        (1, killed("n1", lost="n0"), ["n0,n1", "n1,n2"]),
        (2, killed("n0", lost="n[1-2]"), ["n0", "n0"]),
    ],
)
def test_the_first_rank_is_on_the_first_machine_in_the_order_of_slurm(job, spare, ranks, machines):
    """srun sorts what --nodelist names, and without it takes all of the job's."""
    code, starts, _, said = job(ranks, spare=spare)
    assert code == 0, said
    assert [line.split()[0] for line in starts] == [f"address-of-{names[:2]}" for names in machines], said
    for line, names in zip(starts, machines, strict=True):
        assert (f"--nodelist={names} " in line) if spare else "--nodelist" not in line
    assert [line.split("=")[-1] for line in starts] == ["", *["300"] * (len(starts) - 1)]


def test_what_was_left_out_stays_out_in_the_next_stage(job):
    code, starts, _, said = job(killed("n1"), spare=1, stages=2)
    assert code == 0 and ["--nodelist=n0,n2 " in line for line in starts] == [False, True, True], said


def test_what_it_says_has_left_has_left(job):
    said = job(killed("n1", "n0"), spare=1)[-1]
    assert re.findall("newer checkpoint: (.*)", said) == ["starting again in 0 s, without n1"] * 2


def test_with_too_few_machines_left_it_goes_back_to_the_queue(job):
    code, starts, asked, said = job(killed("n2", lost="n[1-2]"), spare=1)
    assert (code, len(starts), asked) == (85, 1, ["requeue 7"]), said
    assert "Slurm lost n[1-2]" in said and "too few of its machines are left" in said


def test_and_where_it_cannot_have_them(job):
    ranks = killed("n1").replace(
        "exit 0", 'echo "srun: error: Unable to create step for job 7: Requested nodes are busy" >&2; exit 1'
    )
    code, starts, asked, said = job(ranks, spare=1)
    assert (code, len(starts), asked) == (85, 2, ["requeue 7"]), said


def test_two_other_machines_look_after_the_first_where_slurm_would_keep_the_job_without_it(job, tmp_path):
    """Those that are left; without --no-kill Slurm requeues the job itself."""
    said = job(killed("n1"), spare=1, stages=2)[-1]
    first, second = (tmp_path / "guards").read_text().splitlines()
    assert "--nodes=2 --ntasks=2 " in first and "--nodelist=n1,n2" in first
    assert "--nodes=1 --ntasks=1 " in second and "--nodelist=n2" in second
    assert "nobody looks after" not in said
    (tmp_path / "guards").unlink()
    job("exit 0")
    assert not (tmp_path / "guards").exists()


def test_where_they_do_not_come_it_is_said_and_tried_again_at_the_next_start(job, tmp_path):
    (tmp_path / "no guards").touch()
    said = job(f"sleep 0.3; [ $n = 1 ] || exit 0; save; {KILLED}")[-1]
    assert "nobody looks after" not in said
    said = job(f"sleep 0.3; [ $n = 3 ] || exit 0; save; {KILLED}", spare=1, stages=2)[-1]
    log = tmp_path / "logs/zero-7/guard.log"
    assert said.count(f"launch: nobody looks after n0 any more (exit code 1; see {log})") == 3, said
    assert log.read_text().count("srun: error: no step") == 3


RUNS = "JobId=7 JobState=RUNNING Requeue=1 Restarts=2 NodeList=n[1-2] BatchHost=n0"
FULL = RUNS.replace("n[1-2]", "n[0-2]")


@pytest.mark.parametrize(
    ("looks", "asked"),
    [
        ([FULL, RUNS, RUNS], ["requeue Incomplete 7"]),
        ([RUNS, FULL, RUNS], []),
        ([RUNS, RUNS.replace("n[1-2]", "broken"), RUNS], []),
        ([RUNS, "", RUNS], []),
        ([RUNS.replace("RUNNING", "COMPLETING")] * 3, []),
        ([RUNS.replace("Restarts=2", "Restarts=3")] * 3, []),
        ([RUNS.replace("n[1-2]", "n2")] * 3, []),
        ([RUNS.replace("Requeue=1", "Requeue=0")] * 2, ["7"]),
        ([RUNS.replace("Restarts=2", "Restarts=5")] * 2, ["7"]),
    ],
    ids=["gone", "there again", "no names", "no answer", "it ends", "another start", "not of this machine", "not to be requeued",
         "too often"],
)  # fmt: skip
def test_who_looks_after_the_first_machine_acts_where_it_is_gone_alone(bash, tmp_path, looks, asked):
    restarts = 5 if "Restarts=5" in looks[0] else 2
    (tmp_path / "looks").write_text("\n".join([*looks, "JobState=COMPLETED"]))
    done = bash(f"look_after n0 0.01 {restarts} 5", SLURMD_NODENAME="n1")
    assert done == (0, asked)


def test_a_requeue_that_is_refused_is_asked_again(bash, tmp_path):
    (tmp_path / "looks").write_text("\n".join([RUNS] * 3 + ["JobState=COMPLETED"]))
    (tmp_path / "refused").touch()
    assert bash("look_after n0 0.01 2 5", SLURMD_NODENAME="n1") == (0, ["requeue Incomplete 7"] * 2)


@pytest.mark.parametrize("spare", [3, "one"])
def test_spare_machines_are_fewer_than_all(job, spare):
    code, starts, _, said = job("exit 0", spare=spare)
    assert (code, starts) == (2, []) and f"R1MEGA_SPARE_NODES={spare}: not fewer than the job's machines (3)" in said


def test_without_a_spare_machine_it_starts_on_the_same_ones(job):
    code, starts, _, said = job(f"[ $n = 1 ] || exit 0; save; {KILLED}")
    assert (code, len(starts)) == (0, 2), said
    assert "--nodelist" not in starts[0] + starts[1] and ", without" not in said


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


def signalled(directory, *names, start=1):
    """Sends them, one a moment after the other, to the script after that start."""

    def send(process):
        until(lambda: (path := directory / "starts").exists() and path.read_text().count("\n") >= start)
        for name in names:
            time.sleep(0.3)
            process.send_signal(getattr(signal, name))

    return send


def until(condition):
    limit = time.monotonic() + 30
    while not condition() and time.monotonic() < limit:
        time.sleep(0.02)


def test_a_step_longer_than_the_warning_goes_back_to_the_queue_before_the_limit(job, tmp_path):
    began = time.time()
    code, starts, asked, said = job(
        "save; sleep 50", end=began + 6, R1MEGA_LAST_SECONDS="4", meanwhile=signalled(tmp_path, "SIGUSR1")
    )
    assert (code, len(starts), asked) == (85, 1, ["--signal=USR2 7", "requeue 7"]), said
    assert time.time() - began < 50 and "longer than the warning" in said


def test_but_not_where_nothing_was_kept(job, tmp_path):
    code, _, asked, said = job(
        "sleep 4; exit 1", end=time.time() + 3, R1MEGA_LAST_SECONDS="2", meanwhile=signalled(tmp_path, "SIGUSR1")
    )
    assert (code, asked) == (1, ["--signal=USR2 7"]), said
    assert "the time limit comes before the first checkpoint" in said


def test_progress_before_a_start_within_the_job_counts(job, tmp_path):
    """The newer checkpoint is what the second start went on from; a requeued job begins there too."""
    began = time.time()
    ranks = f"[ $n = 1 ] && {{ save; {KILLED}; }}; sleep 50"
    code, starts, asked, said = job(
        ranks, end=began + 6, R1MEGA_LAST_SECONDS="4", meanwhile=signalled(tmp_path, "SIGUSR1", start=2)
    )
    assert (code, len(starts), asked) == (85, 2, ["--signal=USR2 7", "requeue 7"]), said


def test_the_run_says_how_long_before_the_limit_it_wants_to_be_warned(job, tmp_path):
    """Half of the time is over, and Slurm's own signal would come later, or never."""
    ranks = """mkdir -p $DIRECTORY/run; echo '{"save_seconds": 7, "warning_seconds": 20}' > $DIRECTORY/run/pace.json
    for i in {1..150}; do ! grep -q USR2 "$DIRECTORY/asked" 2>/dev/null || exit 85; sleep 0.1; done"""
    began = time.time()
    code, _, asked, said = job(ranks, end=began + 25)
    assert (code, asked) == (85, ["--signal=USR2 7", "requeue 7"]), said
    assert 4 <= time.time() - began < 15  # Slurm tells the end in whole seconds
    (tmp_path / "asked").unlink()
    code, _, asked, said = job("sleep 3; exit 3", end=time.time() + 1000)
    assert (code, asked) == (3, []), f"far from the limit it is not: {said}"


def test_a_warning_shorter_than_the_last_seconds_is_halved(job, tmp_path):
    ranks = "save; sleep 2; exit 85"
    code, _, asked, said = job(ranks, end=time.time() + 30, meanwhile=signalled(tmp_path, "SIGUSR1"))
    assert (code, asked) == (85, ["--signal=USR2 7", "requeue 7"])
    assert "state saved, back" in said and "longer than the warning" not in said


def test_a_controller_that_does_not_answer_is_asked_again(job, tmp_path):
    (tmp_path / "mute").touch()
    began = time.time()
    code, _, asked, said = job("save; sleep 50", end=began + 5, meanwhile=signalled(tmp_path, "SIGUSR1"))
    assert (code, asked) == (85, ["--signal=USR2 7", "requeue 7"]), said
    assert not (tmp_path / "mute").exists() and 2 < time.time() - began < 30


def test_asked_to_stop_before_the_step_is_there(job, tmp_path):
    """No step is there to get the signal: none begins."""
    ranks = f"touch $DIRECTORY/slow; [ $n = 1 ] && {{ save; {KILLED}; }}; exit 0"

    def meanwhile(process):
        until((tmp_path / "asks").exists)
        process.send_signal(signal.SIGUSR1)

    code, starts, asked, said = job(ranks, meanwhile=meanwhile)
    assert (code, len(starts), asked) == (85, 1, ["--signal=USR2 7", "requeue 7"]), said


def test_a_step_that_comes_later_is_asked_again(job, tmp_path):
    ranks = 'for i in {1..100}; do [ $(grep -c USR2 "$DIRECTORY/asked") -lt 2 ] 2>/dev/null || exit 85; sleep 0.1; done'
    code, _, _, said = job(ranks, meanwhile=signalled(tmp_path, "SIGUSR1"))
    assert code == 85, said


def test_asked_before_a_rank_listens_it_goes_back_to_the_queue(job, tmp_path):
    ranks = 'sleep 1; echo "srun: error: n1: task 9: User defined signal 2" >&2; exit 140'
    code, _, asked, said = job(ranks, meanwhile=signalled(tmp_path, "SIGUSR1"))
    assert (code, asked) == (85, ["--signal=USR2 7", "requeue 7"]) and "asked to stop while it started" in said


def test_asked_during_a_stage_that_ends_the_next_one_does_not_begin(job, tmp_path):
    code, starts, asked, said = job("sleep 1", stages=2, meanwhile=signalled(tmp_path, "SIGUSR1"))
    assert (code, len(starts), asked) == (85, 1, ["--signal=USR2 7", "requeue 7"]), said


def test_where_the_stage_before_ran_decides_nothing(job):
    """The second stage died before it said where it runs."""
    code, starts, _, said = job(f"[ $n = 1 ] && {{ touch $DIRECTORY/silent; exit 0; }}; save; {KILLED}", stages=2)
    assert (code, len(starts)) == (137, 2), said


def test_ranks_that_crash_or_lose_a_peer_say_where_and_end(job):
    said = job('echo "$PYTHONFAULTHANDLER $TORCH_NCCL_ASYNC_ERROR_HANDLING $NCCL_DEBUG"; exit 2')[-1]
    assert "\n1 1 WARN\n" in said


def test_what_slurm_says_of_errors_is_in_the_log_once(job):
    said = job(KILLED)[-1]
    assert said.count("srun: error: n1: task 9: Killed") == 1


def test_nothing_of_it_is_left(job, tmp_path):
    job("sleep 1; exit 85", R1MEGA_LAST_SECONDS="1", meanwhile=signalled(tmp_path, "SIGUSR1"))
    time.sleep(0.2)
    mine = f"DIRECTORY={tmp_path}".encode()
    assert [path for path in Path("/proc").glob("[0-9]*") if mine in environment(path)] == []


def environment(process):
    try:
        return (process / "environ").read_bytes()
    except OSError:
        return b""


def test_cancelled_while_it_waits_it_stays_down(job, tmp_path):
    def meanwhile(process):
        until(lambda: "starting again" in (tmp_path / "said").read_text())
        process.terminate()

    code, starts, asked, said = job(f"save; {KILLED}", SECONDS_TO_WAIT="50", meanwhile=meanwhile)
    assert (code, len(starts)) == (85, 1), said
    assert asked == ["--signal=USR2 7"] and "cancelled, so it stays down" in said


SAVES_SLOWLY = "for i in {1..20}; do sleep 0.1; done; exit 85"


@pytest.mark.parametrize("end", [10**10, 100], ids=["no limit near", "100 s before the limit"])
@pytest.mark.parametrize("names", [("SIGTERM", "SIGUSR1"), ("SIGUSR1", "SIGTERM")])
def test_cancelled_before_or_after_a_warning_it_stays_down(job, tmp_path, names, end):
    """One that the run itself wanted, by its pace, may be hours before the limit."""
    end = end if end > 10**9 else time.time() + end
    code, _, asked, said = job(SAVES_SLOWLY, end=end, meanwhile=signalled(tmp_path, *names))
    assert (code, asked) == (85, ["--signal=USR2 7"]) and "cancelled, so it stays down" in said, said


@pytest.mark.parametrize(
    ("names", "more", "seconds"),
    [(("SIGUSR1", "SIGTERM"), "", 40), (("SIGTERM",), "PreemptTime=2026-11-29T09:00:00", 10**6),
     (("SIGUSR1", "SIGTERM"), "PreemptTime=2026-11-29T09:00:00", 10**6)],
    ids=["the limit", "preempted", "warned and preempted"],
)  # fmt: skip
def test_ended_by_slurm_it_comes_back(job, tmp_path, names, more, seconds):
    end = time.time() + seconds
    code, _, asked, said = job(SAVES_SLOWLY, end=end, meanwhile=signalled(tmp_path, *names), MORE=more)
    assert (code, asked) == (85, ["--signal=USR2 7", "requeue 7"]), said


def test_once_warned_it_does_not_wait_for_another_warning(bash):
    """Which would have it stop later: half of what is left then before the limit."""
    ended = "sleep 20 & early=$!; be_warned; wait $early; [ $? = 143 ] || exit 1"
    code, asked = bash(f"{ended}; first=$timer; be_warned; [ $timer = $first ] || exit 2; stop_timer", END=str(10**10))
    assert (code, asked) == (0, ["--signal=USR2 7"] * 2)


def test_reminders_become_rarer(bash, tmp_path):
    """An early warning may be hours before the limit."""
    sleep = 'sleep() { echo "$1" >> "$DIRECTORY/asked"; [ "$(grep -vc USR2 "$DIRECTORY/asked")" -lt 5 ] || command sleep 3; }'
    _, asked = bash(f"{sleep}; remind; command sleep 2; stop_timer", END="")
    assert asked == ["10", again := "--signal=USR2 7", "20", again, "40", again, "60", again, "60"]


def test_that_slurm_does_not_take_it_back_is_said(job, tmp_path):
    (tmp_path / "refused").touch()
    assert "Slurm does not take the job back; submit it again" in job("save; exit 85")[-1]
