"""What `r1mega check-nodes` finds: one planted fault for each check, and two real ranks of which one is another machine."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from r1mega import check_nodes
from r1mega.check_nodes import Facts, Gpu, ask_nvidia_smi, problems, read_gpu, slow_ranks
from tests.dist.launch import launch

pytestmark = pytest.mark.heavy

GPU = Gpu(81559, 4, 0, 1980, 0)
WORLD = 4


def facts(rank: int, **changes) -> Facts:
    fit = Facts(
        rank, f"node{rank // 2}", 2, {"torch": "2.13.0", "commit of r1mega": "abc"}, 2, GPU, 1000.0 + 0.01 * rank, 65536, 2**34,
        None, 10**12, 700.0, 2800.0, {rank ^ 1: 200.0, (rank + 2) % 4: 40.0}, 40.0,
    )  # fmt: skip
    return dataclasses.replace(fit, **changes)


def gpu(**changes) -> dict[str, Gpu]:
    return {"gpu": dataclasses.replace(GPU, **changes)}


def found_in(ranks: list[Facts], *, free_bytes: int = 0) -> list[str]:
    return [*problems(ranks, free_bytes=free_bytes), *slow_ranks(ranks, 0.85)]


def test_a_job_that_is_fit():
    assert list(found_in([facts(rank) for rank in range(WORLD)])) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"program": {"torch": "2.12.0", "commit of r1mega": "abc"}}, "torch is 2.12.0, elsewhere 2.13.0"),
        ({"program": {"torch": "2.13.0", "commit of r1mega": "abd"}}, "commit of r1mega is abd, elsewhere abc"),
        ({"program": {"commit of r1mega": "abc"}}, "torch is missing, elsewhere 2.13.0"),
        ({"gpu_count": 1}, "sees 1 GPUs, others 2; look at nvidia-smi -L"),
        (gpu(memory_mib=40960), "its GPU has 40960 MiB, the median 81559"),
        (gpu(used_mib=9000), "9000 MiB of its GPU are taken"),
        (gpu(ecc_errors=3), "3 uncorrected ECC errors"),
        (gpu(max_clock_mhz=1410), "clock may reach 1410 MHz, others' 1980"),
        (gpu(throttle_reasons=0x40), "slowed down by hardware, heat or power (reasons 0x40)"),
        ({"gpu": Gpu()}, "nvidia-smi tells nothing of its GPU: ECC, clocks and throttling are unchecked"),
        ({"clock": 1030.0}, "its clock is +30.0 s off the median"),
        ({"open_files": 1023}, "1023 open files allowed, 1024 wanted"),
        ({"shared_memory_bytes": 64 * 2**20}, "/dev/shm has 64 MiB free"),
        ({"disk_error": "/x: No space left on device"}, "run_dir: /x: No space left on device"),
        ({"disk_free_bytes": 10**9}, "run_dir has 1.0 GB free, 5.0 wanted"),
        ({"matmul_tflops": 500.0}, "matrix product 500 TFLOP/s, the median 700"),
        ({"copy_gb": 1000.0}, "copy in memory 1e+03 GB/s, the median 2.8e+03"),
        ({"whole_gb": 4.0}, "all-reduce of all 4 GB/s, the median 40"),
        ({"wrong_sums": ("with rank 0",)}, "the all-reduce with rank 0 gave a wrong sum"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_found_and_nothing_else(changes, said):
    ranks = [facts(rank, **(changes if rank == 1 else {})) for rank in range(WORLD)]
    (found,) = found_in(ranks, free_bytes=5 * 10**9)
    assert found.startswith("rank 1 on node0: ") and said in found


def test_a_slow_link_is_found_by_its_two_ranks():
    """Pairs within a machine and between machines are compared with their like alone."""
    ranks = [facts(0), facts(1), facts(2, pair_gb={3: 20.0, 0: 40.0}), facts(3)]
    assert list(found_in(ranks)) == ["ranks 2 and 3: all-reduce 20 GB/s, the median 110 of such pairs"]


def test_what_a_process_itself_takes_of_a_small_gpu_is_no_fault():
    ranks = [facts(rank, **gpu(memory_mib=16384, used_mib=1500)) for rank in range(WORLD)]
    assert list(found_in(ranks)) == []
    ranks[1] = facts(1, **gpu(memory_mib=16384, used_mib=2100))
    (found,) = found_in(ranks)
    assert "2100 MiB of its GPU are taken" in found


def test_what_nvidia_smi_prints():
    assert read_gpu("81559, 4, 0, 1980, 0x0000000000000001\n") == Gpu(81559, 4, 0, 1980, 1)
    assert read_gpu("15360, 0, [N/A], 1590, 0x0000000000000000\n") == Gpu(15360, 0, None, 1590, 0)
    parts = read_gpu("WARNING: infoROM is corrupted at gpu 0000:3B:00.0\n20096, [N/A], [N/A], [N/A], [Not Supported]\n")
    assert parts == Gpu(memory_mib=20096)
    assert list(found_in([facts(rank, gpu=parts) for rank in range(WORLD)])) == []


@pytest.mark.parametrize(
    "known", ["clocks_event_reasons.active", "clocks_throttle_reasons.active", "of another driver"]
)
def test_nvidia_smi_of_any_driver_or_none(tmp_path, monkeypatch, known):
    """A program of this name that knows one of the two names, as drivers do, and refuses the query for another."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ask_nvidia_smi("GPU-0") == Gpu(), "no such program"
    program = tmp_path / "nvidia-smi"
    program.write_text(f"""#!/bin/sh
case "$2" in
*,"{known}") echo "81559, 4, 0, 1980, 0x0000000000000040" ;;
*) echo "Field is not a valid field to query."; exit 2 ;;
esac
""")
    program.chmod(0o755)
    assert ask_nvidia_smi("GPU-0") == (Gpu() if known.startswith("of") else Gpu(81559, 4, 0, 1980, 0x40))


@pytest.mark.parametrize(
    ("again", "slow", "gpus", "code", "notes"),
    [
        (700.0, 0.85, 1, 0, 0),  # slow once: it was busy
        (100.0, None, 1, 1, 0),
        (100.0, None, 0, 0, 1),  # on a CPU
        (450.0, None, 0, 0, 0),
        (450.0, None, 1, 1, 0),
        (100.0, 0.85, 0, 1, 0),  # on a CPU, as asked
    ],
)
def test_what_is_slow_twice_fails_but_on_a_cpu_only_when_asked(capsys, again, slow, gpus, code, notes):
    ranks = [facts(rank, gpu_count=gpus, matmul_tflops=100.0 if rank == 0 else 700.0) for rank in range(WORLD)]
    better = dataclasses.replace(ranks[0], matmul_tflops=again)
    with mock.patch.multiple(
        check_nodes, measure=lambda run_dir: ranks[0], with_speeds=lambda own: better, adopt_launcher_environment=mock.DEFAULT,
        groups=mock.DEFAULT, dist=mock.Mock(get_rank=lambda: 0), _all=lambda own: [own, *ranks[1:]],
    ):  # fmt: skip
        assert check_nodes.run_check(None, slow=slow, free_gb=0) == code
    said = capsys.readouterr().out
    assert said.count("note: rank 0 on node0: matrix product") == notes and ("machines: fit" in said) == (code == 0)


def test_nothing_is_left_on_a_disk_that_is_full(tmp_path, monkeypatch):
    """Of what would keep it so."""
    error = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(check_nodes.dist, "get_rank", lambda: 3)
    monkeypatch.setattr(check_nodes.os, "fsync", mock.Mock(side_effect=error))
    assert check_nodes.try_disk(tmp_path / "run") == (f"{tmp_path}: No space left on device", 0)
    assert list(tmp_path.iterdir()) == []


def check(run_dir: Path) -> tuple[list[str], list[Facts]]:
    """On rank 1: another version, a disk that is full, a matrix product a thousand times as slow; both times."""
    if dist.is_initialized():
        raise RuntimeError
    planted = mock.patch.multiple(
        check_nodes, program=lambda: {"torch": "1.0"}, try_disk=lambda path: (OSError(errno.ENOSPC, "full").strerror, 0),
        matmul_tflops=lambda device: 1e-6,
    )  # fmt: skip
    heard: list[list[Facts]] = []
    told: list[list[str]] = []
    with mock.patch.multiple(
        check_nodes, PROBE_SECONDS=0.02, ALL_REDUCE_BYTES=2**20, say=lambda ranks, found, notes: (heard.append(ranks), told.append(found)),
    ):  # fmt: skip
        if os.environ["RANK"] == "1":
            with planted:
                code = check_nodes.run_check(run_dir, slow=0.05, free_gb=0)
        else:
            code = check_nodes.run_check(run_dir, slow=0.05, free_gb=0)
    assert code == 1
    return (told[0], heard[0]) if told else ([], [])


def test_two_ranks_hear_of_each_other(tmp_path):
    (found, ranks), _ = launch(check, 2, tmp_path / "not/yet/there")
    assert [facts.rank for facts in ranks] == [0, 1]
    assert all(list(facts.pair_gb) == [1 - facts.rank] and facts.whole_gb for facts in ranks)
    assert all(facts.wrong_sums == () for facts in ranks)
    assert ranks[0].disk_error is None and not list(tmp_path.iterdir())
    text = "\n".join(found)
    assert "torch is 1.0" in text and "run_dir: full" in text and "matrix product 1e-06" in text
    assert all(line.startswith("rank 1 on") or "1.0" in line for line in found), text


def test_one_rank_alone_has_nobody_to_exchange_with(tmp_path):
    (facts,) = launch(alone, 1, tmp_path)
    assert facts.pair_gb == {} and facts.whole_gb is None and facts.matmul_tflops > 0 and facts.copy_gb > 0
    assert facts.shared_memory_bytes == 11, "what is free of /dev/shm, not what it has"
    assert facts.gpu == dataclasses.replace(GPU, throttle_reasons=0x40), "memory before the load, clocks after it"


def alone(run_dir: Path) -> Facts:
    from r1mega.platform import groups

    groups.init_distributed()
    usage = type(shutil.disk_usage("/"))(100, 89, 11)
    loaded: list[float] = []
    copy_gb = check_nodes.copy_gb
    with mock.patch.object(shutil, "disk_usage", lambda path: usage), mock.patch.multiple(
        check_nodes, PROBE_SECONDS=0.02, copy_gb=lambda device: loaded.append(copy_gb(device)) or loaded[-1],
        gpu=lambda device: dataclasses.replace(GPU, used_mib=3900, throttle_reasons=0x40) if loaded else GPU,
    ):  # fmt: skip
        return check_nodes.measure(run_dir)
