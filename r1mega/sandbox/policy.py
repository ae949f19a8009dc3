"""What an answer may see and use, and the command line that holds it to that.

    sh (joins the cgroup) -> setpriv (a uid nobody has) -> bwrap (namespaces, mounts, seccomp) -> prlimit -> sh (pid 1)
    -> program

The order carries the security: root must be gone before bwrap starts (with root outside, files of root under /proc/sys
can be written from inside whatever the capabilities say), limits on processes are set inside the user namespace
(outside they are shared with the neighbours of the same uid), and the root is made read-only last.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from r1mega.sandbox.verdict import SandboxUnavailable

Language = Literal["python", "cpp"]
_MIB = 1 << 20
INSTALL = (
    "install bubblewrap and util-linux (Debian, Ubuntu: `apt-get install -y bubblewrap util-linux`), allow "
    "unprivileged user namespaces, or configure the remote backend; answers are never run without isolation"
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run may use. wall_seconds also counts sleeping and waiting for a CPU; cpu_seconds is per process.

    memory_bytes: of the whole process tree with a cgroup, of each process's address space without one.
    output_bytes: stdout and stderr together; message_bytes: one value returned to a grader. tmp_bytes: size of /tmp.
    """

    wall_seconds: float = 10.0
    cpu_seconds: int = 6
    memory_bytes: int = 512 * _MIB
    output_bytes: int = 1 * _MIB
    message_bytes: int = 16 * _MIB
    tmp_bytes: int = 16 * _MIB
    file_bytes: int = 16 * _MIB
    num_processes: int = 32
    num_files: int = 64
    stack_bytes: int = 8 * _MIB


COMPILER_LIMITS = Limits(
    wall_seconds=30.0,
    cpu_seconds=20,
    memory_bytes=1536 * _MIB,
    output_bytes=32 * _MIB,
    tmp_bytes=64 * _MIB,
    file_bytes=64 * _MIB,
)


@dataclass(frozen=True, slots=True)
class Policy:
    """python: interpreter for answers (None: the system's, else the base of ours); libraries: directories bound
    read-only as /box/lib/0, /box/lib/1 ... and put on the answer's sys.path; hash_seed: PYTHONHASHSEED inside, so that
    a score does not depend on set order; require_cgroup: refuse to run without a memory cgroup instead of falling back
    to polling."""

    python: str | None = None
    libraries: tuple[str, ...] = ()
    hash_seed: int = 0
    require_cgroup: bool = False

    @property
    def library_paths(self) -> tuple[str, ...]:
        """Where the libraries lie inside."""
        return tuple(f"/box/lib/{index}" for index in range(len(self.libraries)))


@dataclass(frozen=True, slots=True)
class Toolchain:
    """Absolute paths of what the command line is made of. python_mounts: directories to bind for the interpreter."""

    bwrap: str
    setpriv: str
    prlimit: str
    shell: str
    python: str
    python_mounts: tuple[str, ...]
    compiler: str | None


_SYSTEM_MOUNTS = ("/usr/bin", "/usr/lib", "/usr/lib64")  # not /usr/local, /usr/share: a site's own files live there
_COMPILER_MOUNTS = ("/usr/include", "/usr/libexec")
_USR_MERGED = ("/bin", "/lib", "/lib64")


def _find(tool: str) -> str:
    path = shutil.which(tool, path="/usr/bin:/bin:/usr/sbin:/sbin:" + os.environ.get("PATH", ""))
    if path is None:
        raise SandboxUnavailable(f"sandbox: `{tool}` is not installed; {INSTALL}")
    return os.path.realpath(path)


def _inside_path(tool: str) -> str:
    """A tool that runs inside must lie under /usr/bin, which is what is bound."""
    path = f"/usr/bin/{tool}"
    if not os.access(path, os.X_OK):
        raise SandboxUnavailable(f"sandbox: {path} is missing; {INSTALL}")
    return path


def _readable_by_everyone(path: str) -> bool:
    """Whether a uid without any rights here could open `path`: every directory on the way has o+x, the end o+r."""
    path = os.path.realpath(path)
    if not os.path.exists(path) or not os.stat(path).st_mode & 0o004:
        return False
    while path != "/":
        path = os.path.dirname(path)
        if not os.stat(path).st_mode & 0o001:
            return False
    return True


def _modern(python: str) -> bool:
    check = subprocess.run(
        [python, "-I", "-S", "-c", "import sys; sys.exit(sys.version_info < (3, 8))"], capture_output=True
    )
    return check.returncode == 0


def find_python(preferred: str | None) -> tuple[str, tuple[str, ...]]:
    """(interpreter, directories to bind for it beyond /usr). The system's comes first: everyone can read it.

    Raises SandboxUnavailable when no interpreter of Python >= 3.8 is readable by an unprivileged uid.
    """
    base = getattr(sys, "_base_executable", sys.executable)
    newest_first = [f"/usr/bin/python3.{minor}" for minor in range(20, 7, -1)]
    rejected = []
    for candidate in [preferred] if preferred else ["/usr/bin/python3", *newest_first, base]:
        path = os.path.realpath(candidate)
        prefix = os.path.dirname(os.path.dirname(path))
        if not os.access(path, os.X_OK):
            continue
        if (os.geteuid() == 0 and not _readable_by_everyone(path)) or not _modern(path):
            rejected.append(path)
            continue
        return path, () if path.startswith("/usr/bin/") else (prefix,)
    raise SandboxUnavailable(
        f"sandbox: no Python >= 3.8 that an unprivileged user can read (tried {', '.join(rejected) or candidate}); "
        "install python3 under /usr or set the sandbox's `python` to an interpreter outside of private directories"
    )


def find_toolchain(policy: Policy) -> Toolchain:
    """Resolve every tool. Raises SandboxUnavailable that names the first one missing and how to get it."""
    if sys.platform != "linux":
        raise SandboxUnavailable(f"sandbox: Linux only (this is {sys.platform}); configure the remote backend")
    python, mounts = find_python(policy.python)
    compiler = "/usr/bin/g++" if os.access("/usr/bin/g++", os.X_OK) else None
    return Toolchain(
        _find("bwrap"), _find("setpriv"), _inside_path("prlimit"), _inside_path("sh"), python, mounts, compiler
    )


def unused_uid() -> int | None:
    """A uid that no account and no neighbour has, for one run; None when we are not root and cannot change ours.

    From the range that systemd's table of uids leaves unassigned (1879048192 and up); inside a user namespace with few
    uids mapped, from 61184 to 65519 (systemd's range for short-lived users).
    """
    if os.geteuid() != 0:
        return None
    with open("/proc/self/uid_map", encoding="ascii") as handle:
        mapped = sum(int(line.split()[2]) for line in handle)
    if mapped > 0x70000000 + (1 << 20):
        return 0x70000000 + secrets.randbelow(1 << 20)
    if mapped >= 65520:
        return 61184 + secrets.randbelow(65520 - 61184)
    raise SandboxUnavailable(
        f"sandbox: running as root of a user namespace with {mapped} uids, none of which is free for answers; "
        "run as an unprivileged user instead"
    )


def _mounts(tools: Toolchain, with_compiler: bool) -> list[str]:
    arguments: list[str] = []
    sources = _SYSTEM_MOUNTS + (_COMPILER_MOUNTS if with_compiler else ()) + tools.python_mounts
    for source in sources:
        if os.path.isdir(source):
            arguments += ["--ro-bind", source, source]
    for path in _USR_MERGED:
        if os.path.islink(path):
            arguments += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            arguments += ["--ro-bind", path, path]
    return arguments


def command_line(
    tools: Toolchain,
    policy: Policy,
    limits: Limits,
    program: Sequence[str],
    *,
    cgroups: Sequence[str],
    seccomp_fd: int,
    status_fd: int,
    files: Mapping[str, tuple[int, int]],
    with_compiler: bool = False,
) -> list[str]:
    """The whole argv. files: path inside -> (file descriptor to copy from, permission bits); they end up read-only.

    cgroups: directories whose `cgroup.procs` the first process joins, while it still has the right to.
    """
    join = "".join(f'echo $$ >"${{{index}}}/cgroup.procs" && ' for index in range(1, len(cgroups) + 1))
    argv = [tools.shell, "-c", f'{join}shift {len(cgroups)} && exec "$@"', "sandbox", *cgroups]
    argv += [tools.setpriv, "--no-new-privs", "--inh-caps=-all"]
    if (uid := unused_uid()) is not None:
        argv += [f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    argv += [tools.bwrap, "--unshare-all", "--unshare-user", "--disable-userns", "--uid", "65534", "--gid", "65534"]
    argv += ["--die-with-parent", "--new-session", "--cap-drop", "ALL", "--as-pid-1", "--hostname", "sandbox"]
    argv += ["--seccomp", str(seccomp_fd), "--json-status-fd", str(status_fd)]
    argv += _mounts(tools, with_compiler)
    argv += ["--proc", "/proc", "--ro-bind", "/proc/sys", "/proc/sys", "--dev", "/dev"]
    argv += ["--size", str(_MIB), "--tmpfs", "/dev/shm", "--size", str(limits.tmp_bytes), "--tmpfs", "/tmp"]
    for source, path in zip(policy.libraries, policy.library_paths, strict=True):
        argv += ["--ro-bind", source, path]
    for path, (descriptor, permissions) in files.items():
        argv += ["--perms", f"{permissions:04o}", "--file", str(descriptor), path]
    argv += ["--clearenv", "--setenv", "PATH", "/usr/bin", "--setenv", "HOME", "/tmp", "--setenv", "LANG", "C.UTF-8"]
    argv += [
        "--setenv",
        "PYTHONHASHSEED",
        str(policy.hash_seed),
        "--chdir",
        "/tmp",
        "--remount-ro",
        "/dev",
        "--remount-ro",
        "/",
    ]
    # With a cgroup the resident memory is what counts, and address space may be reserved freely (thread stacks,
    # arenas).
    address_space = limits.memory_bytes * (4 if cgroups else 1)
    argv += [tools.prlimit, f"--as={address_space}", f"--nproc={limits.num_processes}", f"--nofile={limits.num_files}"]
    argv += [
        f"--fsize={limits.file_bytes}",
        f"--cpu={limits.cpu_seconds}:{limits.cpu_seconds + 1}",
        "--core=0",
        "--memlock=0",
    ]
    argv += ["--msgqueue=0", "--rtprio=0", f"--stack={limits.stack_bytes}"]
    # pid 1 inside is a shell that only waits: an ordinary process keeps the default actions of signals, and when the
    # shell ends the kernel kills whatever is left. The out-of-memory killer is pointed at the program, away from bwrap.
    argv += [tools.shell, "-c", 'echo 1000 >/proc/self/oom_score_adj; "$@"; exit $?', "init", *program]
    return argv
