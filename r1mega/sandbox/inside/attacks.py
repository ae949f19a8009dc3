"""Runs in the sandbox: what the start-up probe tries. One line each: the name, a tab, and '-' or what was reached."""

import ctypes
import os
import socket
import sys

FILE, PORT, ABSTRACT, PID = sys.argv[-4:]
libc = ctypes.CDLL(None, use_errno=True)
X86 = os.uname().machine == "x86_64"


def attempt(name, attack):
    try:
        reached = attack()
    except (OSError, ValueError, AttributeError):
        reached = None
    print("%s\t%s" % (name, "-" if reached in (None, False, [], "") else repr(reached)[:200]), flush=True)


def call(number_x86, number_arm, *arguments):
    """A raw system call; what it returned if it was let through."""
    result = libc.syscall(number_x86 if X86 else number_arm, *arguments)
    return "system call gave %d" % result if result >= 0 else None


def read(path):
    with open(path) as handle:
        return handle.read(200)


def write(path, text="x"):
    with open(path, "w") as handle:
        handle.write(text)
    return "wrote " + path


def connect(family, address):
    with socket.socket(family, socket.SOCK_STREAM) as link:
        link.settimeout(1)
        link.connect(address)
        return "connected"


def status(field):
    for line in open("/proc/self/status"):
        if line.startswith(field + ":"):
            return line.split()[1]


def symlink():
    os.symlink("/proc/1/root" + FILE, "/tmp/link")
    return read("/tmp/link")


def outside_uid():
    """Whether root of the host is behind our uid: its uid_map would begin with '65534 0'."""
    inside, outside, _ = read("/proc/self/uid_map").split()
    return "host root" if outside == "0" and os.path.exists("/sbin/init") else None


attempt("read a host file", lambda: read(FILE))
attempt("read it by /proc/1/root", lambda: read("/proc/1/root" + FILE))
attempt("read it by a symlink", symlink)
attempt("read /etc/passwd", lambda: read("/etc/passwd"))
attempt(
    "see home directories",
    lambda: [d for d in ("/root", "/home", "/work", "/mnt", "/sys", "/var") if os.path.exists(d)],
)
attempt("environment", lambda: sorted(set(os.environ) - {"PATH", "HOME", "LANG", "PWD", "PYTHONHASHSEED", "LC_CTYPE"}))
attempt(
    "host process",
    lambda: os.path.exists("/proc/%s/environ" % PID) and int(PID) > 50 and read("/proc/%s/environ" % PID),
)
attempt("other processes", lambda: [p for p in os.listdir("/proc") if p.isdigit() and int(p) > 20])
attempt("descriptors", lambda: [d for d in os.listdir("/proc/self/fd") if int(d) > 3])
attempt("capabilities", lambda: int(status("CapEff"), 16) or int(status("CapBnd"), 16))
attempt("new privileges", lambda: status("NoNewPrivs") != "1")
attempt("no system call filter", lambda: status("Seccomp") != "2")
attempt("host root outside", outside_uid)
attempt("write /usr", lambda: write("/usr/bin/x"))
attempt("write the root", lambda: write("/x"))
attempt("write /box", lambda: write("/dev/x"))
attempt("write core_pattern", lambda: write("/proc/sys/kernel/core_pattern"))
attempt("write sysrq", lambda: write("/proc/sysrq-trigger", "h"))
attempt("read kernel memory", lambda: read("/proc/kcore"))
attempt("read kernel log", lambda: read("/dev/kmsg"))
attempt("fill /dev/shm", lambda: write("/dev/shm/x", "x" * (4 << 20)))
attempt("fill /tmp", lambda: write("/tmp/x", "x" * (32 << 20)))
attempt("connect to a port", lambda: connect(socket.AF_INET, ("127.0.0.1", int(PORT))))
attempt("abstract socket", lambda: connect(socket.AF_UNIX, "\0" + ABSTRACT))
attempt("netlink", lambda: socket.socket(16, socket.SOCK_RAW).close() or "opened")
attempt("mount", lambda: None if libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) else "mounted")
attempt("user namespace", lambda: call(272, 97, 0x10000000))
attempt("namespace by clone", lambda: call(56, 220, 0x10000000 | 17, 0, 0, 0, 0))
attempt("clone3", lambda: call(435, 435, 0, 0))
attempt("ptrace", lambda: call(101, 117, 0, 0, 0, 0))
attempt("io_uring", lambda: call(425, 425, 8, ctypes.create_string_buffer(256)))
attempt("bpf", lambda: call(321, 280, 0, ctypes.create_string_buffer(128), 128))
attempt("keyring", lambda: call(250, 219, 0, -3, 0))
attempt("memfd", lambda: call(319, 279, b"x", 0))
attempt("shared memory", lambda: call(29, 194, 0, 1 << 26, 0o1600))
attempt("userfaultfd", lambda: call(323, 282, 1))
attempt("perf events", lambda: call(298, 241, ctypes.create_string_buffer(128), 0, -1, -1, 0))
attempt("process_vm_readv", lambda: call(310, 270, 1, 0, 0, 0, 0, 0))
attempt("chroot", lambda: call(161, 51, b"/tmp"))
attempt("set a clock", lambda: call(227, 112, 0, ctypes.create_string_buffer(16)))
attempt("all tried", lambda: None)
