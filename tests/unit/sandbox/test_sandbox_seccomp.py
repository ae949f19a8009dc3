"""The filter, run by an interpreter of classic BPF written here, against the kernel's own headers."""

from __future__ import annotations

import errno
import re
import struct
from pathlib import Path

import pytest

from r1mega.sandbox import seccomp
from r1mega.sandbox.verdict import SandboxUnavailable

ALLOW, KILL = 0x7FFF0000, 0x80000000
ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


def refused(code: int) -> int:
    return 0x00050000 | code


def decide(program: bytes, number: int, arguments=(), architecture=ARCHITECTURE["x86_64"]) -> int:
    """What the kernel would return for one call (linux/filter.h semantics of the four instructions in use)."""
    data = struct.pack("=IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    instructions = list(struct.iter_unpack("=HBBI", program))
    accumulator = position = 0
    while True:
        code, if_true, if_false, value = instructions[position]
        position += 1
        if code == 0x06:
            return value
        if code == 0x20:
            accumulator = struct.unpack_from("=I", data, value)[0]
            continue
        condition = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[code]
        position += if_true if condition else if_false


@pytest.mark.parametrize("machine", ARCHITECTURE)
def test_ordinary_calls_pass_and_unlisted_ones_do_not_exist(machine):
    program = seccomp.assemble(machine)
    listing = dict(pair.split("=") for pair in seccomp._ARCHITECTURES[machine][1].split())
    guarded = {"clone", "ioctl", "fcntl", "socketpair"}
    allowed = {int(number) for name, number in listing.items() if name not in guarded}
    for number in range(1000):
        expected = ALLOW if number in allowed else refused(errno.ENOSYS)
        if number not in {int(listing[name]) for name in guarded}:
            assert decide(program, number, architecture=ARCHITECTURE[machine]) == expected


@pytest.mark.parametrize("machine", ARCHITECTURE)
def test_numbers_are_the_kernels(machine):
    if not HEADERS[machine].exists():
        pytest.skip(f"{HEADERS[machine]} missing: apt-get install -y linux-libc-dev")
    kernel = {}
    for name, number in re.findall(
        r"#define __NR(?:3264)?_(\w+)\s+(\d+)\s*$", HEADERS[machine].read_text(), re.MULTILINE
    ):
        kernel.setdefault("newfstatat" if (machine, name) == ("aarch64", "fstatat") else name, number)
    for name, number in (pair.split("=") for pair in seccomp._ARCHITECTURES[machine][1].split()):
        assert kernel[name] == number, name
    forbidden = (
        "socket connect ptrace mount unshare setns bpf io_uring_setup keyctl memfd_create clone3 userfaultfd".split()
    )
    program = seccomp.assemble(machine)
    for name in forbidden:
        assert decide(program, int(kernel[name]), architecture=ARCHITECTURE[machine]) == refused(errno.ENOSYS), name


def test_arguments_are_looked_at():
    program = seccomp.assemble("x86_64")
    clone, ioctl, fcntl, socketpair = 56, 16, 72, 53
    assert decide(program, clone, (0x01200011,)) == ALLOW  # fork
    assert decide(program, clone, (0x003D0F00,)) == ALLOW  # a thread
    for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert decide(program, clone, (flag | 17,)) == refused(errno.EPERM)
    assert decide(program, ioctl, (0, 0x5401)) == ALLOW
    assert decide(program, ioctl, (0, 0x5412)) == decide(program, ioctl, (0, 0x541C)) == refused(errno.EPERM)
    assert decide(program, ioctl, (0, 0x5412 | 1 << 40)) == refused(
        errno.EPERM
    )  # the kernel drops the high word as well
    assert decide(program, fcntl, (0, 1031)) == refused(errno.EPERM) and decide(program, fcntl, (0, 3)) == ALLOW
    assert decide(program, socketpair, (1,)) == ALLOW and decide(program, socketpair, (2,)) == refused(errno.EPERM)


def test_other_architectures_are_killed():
    program = seccomp.assemble("x86_64")
    assert decide(program, 0, architecture=0x40000003) == KILL  # i386: int 0x80
    assert decide(program, 0x40000000 | 41) == KILL  # x32
    with pytest.raises(SandboxUnavailable, match="riscv64"):
        seccomp.assemble("riscv64")
