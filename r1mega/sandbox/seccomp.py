"""A seccomp filter assembled by hand: an allow-list of system calls for x86-64 and arm64, as classic BPF.

What is not listed does not exist (ENOSYS): sockets, ptrace, mount, namespaces, bpf, io_uring, keyrings, memfd, SysV
shared memory, message queues, userfaultfd, perf, process_vm_*, clone3 (glibc falls back to clone, whose flags can be
looked at) and every call that a newer kernel brings. Numbers are the kernel's ABI (asm/unistd_64.h,
asm-generic/unistd.h).
"""

from __future__ import annotations

import errno
import platform
import struct

from r1mega.sandbox.verdict import SandboxUnavailable

_X86_64 = """
read=0 write=1 readv=19 writev=20 pread64=17 pwrite64=18 preadv=295 pwritev=296 preadv2=327 pwritev2=328 open=2
openat=257 openat2=437 close=3 close_range=436 lseek=8 dup=32 dup2=33 dup3=292 pipe=22 pipe2=293 fcntl=72 flock=73
fsync=74 fdatasync=75 ftruncate=77 truncate=76 fallocate=285 stat=4 fstat=5 lstat=6 newfstatat=262 statx=332
access=21 faccessat=269 faccessat2=439 readlink=89 readlinkat=267 getdents=78 getdents64=217 getcwd=79 chdir=80
fchdir=81 mkdir=83 mkdirat=258 rmdir=84 unlink=87 unlinkat=263 rename=82 renameat=264 renameat2=316 link=86
linkat=265 symlink=88 symlinkat=266 chmod=90 fchmod=91 fchmodat=268 utime=132 utimes=235 utimensat=280 futimesat=261
umask=95 statfs=137 fstatfs=138 sendfile=40 copy_file_range=326 ioctl=16 poll=7 ppoll=271 select=23 pselect6=270
epoll_create=213 epoll_create1=291 epoll_ctl=233 epoll_wait=232 epoll_pwait=281 epoll_pwait2=441 eventfd=284
eventfd2=290 timerfd_create=283 timerfd_settime=286 timerfd_gettime=287 fadvise64=221 listxattr=194 llistxattr=195
flistxattr=196 getxattr=191 lgetxattr=192 fgetxattr=193
mmap=9 munmap=11 mprotect=10 mremap=25 madvise=28 brk=12 mincore=27 msync=26
clone=56 fork=57 vfork=58 execve=59 exit=60 exit_group=231 wait4=61 waitid=247 kill=62 tgkill=234 tkill=200 getpid=39
getppid=110 gettid=186 getuid=102 geteuid=107 getgid=104 getegid=108 getresuid=118 getresgid=120 getgroups=115
getpgrp=111 getpgid=121 setpgid=109 getsid=124 setsid=112 getrlimit=97 setrlimit=160 prlimit64=302 getrusage=98
times=100 uname=63 sysinfo=99 getcpu=309 sched_yield=24 sched_getaffinity=204 sched_getparam=143
sched_getscheduler=145 sched_get_priority_max=146 sched_get_priority_min=147 getpriority=140 setpriority=141 prctl=157
arch_prctl=158 set_tid_address=218 set_robust_list=273 get_robust_list=274 rseq=334 futex=202 membarrier=324
rt_sigaction=13 rt_sigprocmask=14 rt_sigreturn=15 rt_sigpending=127 rt_sigtimedwait=128 rt_sigsuspend=130
sigaltstack=131 pause=34 alarm=37 setitimer=38 getitimer=36 restart_syscall=219 timer_create=222 timer_settime=223
timer_gettime=224 timer_getoverrun=225 timer_delete=226 clock_gettime=228 clock_getres=229 clock_nanosleep=230
nanosleep=35 gettimeofday=96 time=201 getrandom=318
socketpair=53 sendto=44 recvfrom=45 shutdown=48 getsockopt=55 getsockname=51 getpeername=52
"""

_ARM64 = """
read=63 write=64 readv=65 writev=66 pread64=67 pwrite64=68 preadv=69 pwritev=70 preadv2=286 pwritev2=287 openat=56
openat2=437 close=57 close_range=436 lseek=62 dup=23 dup3=24 pipe2=59 fcntl=25 flock=32 fsync=82 fdatasync=83
ftruncate=46 truncate=45 fallocate=47 fstat=80 newfstatat=79 statx=291 faccessat=48 faccessat2=439 readlinkat=78
getdents64=61 getcwd=17 chdir=49 fchdir=50 mkdirat=34 unlinkat=35 renameat=38 renameat2=276 linkat=37 symlinkat=36
fchmod=52 fchmodat=53 utimensat=88 umask=166 statfs=43 fstatfs=44 sendfile=71 copy_file_range=285 ioctl=29 ppoll=73
pselect6=72 epoll_create1=20 epoll_ctl=21 epoll_pwait=22 epoll_pwait2=441 eventfd2=19 timerfd_create=85
timerfd_settime=86 timerfd_gettime=87 fadvise64=223 listxattr=11 llistxattr=12 flistxattr=13 getxattr=8 lgetxattr=9
fgetxattr=10
mmap=222 munmap=215 mprotect=226 mremap=216 madvise=233 brk=214 mincore=232 msync=227
clone=220 execve=221 exit=93 exit_group=94 wait4=260 waitid=95 kill=129 tgkill=131 tkill=130 getpid=172 getppid=173
gettid=178 getuid=174 geteuid=175 getgid=176 getegid=177 getresuid=148 getresgid=150 getgroups=158 getpgid=155
setpgid=154 getsid=156 setsid=157 getrlimit=163 setrlimit=164 prlimit64=261 getrusage=165 times=153 uname=160
sysinfo=179 getcpu=168 sched_yield=124 sched_getaffinity=123 sched_getparam=121 sched_getscheduler=120
sched_get_priority_max=125 sched_get_priority_min=126 getpriority=141 setpriority=140 prctl=167 set_tid_address=96
set_robust_list=99 get_robust_list=100 rseq=293 futex=98 membarrier=283 rt_sigaction=134 rt_sigprocmask=135
rt_sigreturn=139 rt_sigpending=136 rt_sigtimedwait=137 rt_sigsuspend=133 sigaltstack=132 setitimer=103 getitimer=102
restart_syscall=128 timer_create=107 timer_settime=110 timer_gettime=108 timer_getoverrun=109 timer_delete=111
clock_gettime=113 clock_getres=114 clock_nanosleep=115 nanosleep=101 gettimeofday=169 getrandom=278
socketpair=199 sendto=206 recvfrom=207 shutdown=210 getsockopt=209 getsockname=204 getpeername=205
"""

_ARCHITECTURES = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _ARM64)}  # AUDIT_ARCH_*, linux/audit.h

# CLONE_NEWTIME and CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}: no namespace inside the namespace.
_NAMESPACE_FLAGS = 0x80 | 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
_FORBIDDEN_ARGUMENTS = {  # call: (argument index, values that are refused with EPERM)
    "ioctl": (1, (0x5412, 0x541C)),  # TIOCSTI and TIOCLINUX type into the terminal of whoever started us
    "fcntl": (1, (1031,)),  # F_SETPIPE_SZ: kernel memory by the megabyte
}
_AF_UNIX = 1  # the one family that socketpair knows; asyncio needs it for its own wake-up pipe

# linux/bpf_common.h: load word absolute, jump if equal, jump if any bit set, jump if >=, return constant.
_LOAD, _JUMP_EQUAL, _JUMP_SET, _JUMP_GE, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_KILL_PROCESS, _ALLOW, _ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
_OFFSET_NUMBER, _OFFSET_ARCHITECTURE, _OFFSET_ARGUMENTS = 0, 4, 16  # struct seccomp_data


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _guard(number: int, argument: int, tests: list[tuple[int, int]], refuse_on_match: bool) -> bytes:
    """Decide one call by the low word of an argument; every path of a guarded call ends in a return."""
    outcome = _instruction(_RETURN, _ERRNO | errno.EPERM if refuse_on_match else _ALLOW)
    otherwise = _instruction(_RETURN, _ALLOW if refuse_on_match else _ERRNO | errno.EPERM)
    body = _instruction(_LOAD, _OFFSET_ARGUMENTS + 8 * argument)
    for opcode, value in tests:
        body += _instruction(opcode, value, 0, 1) + outcome
    body += otherwise
    return _instruction(_JUMP_EQUAL, number, 0, len(body) // 8) + body


def assemble(machine: str | None = None) -> bytes:
    """The filter for `machine` (default: this one) as an array of struct sock_filter, as bwrap's --seccomp reads it.

    Raises SandboxUnavailable on an architecture without a table.
    """
    machine = machine or platform.machine()
    if machine not in _ARCHITECTURES:
        raise SandboxUnavailable(
            f"sandbox: no system call table for {machine} (have {', '.join(_ARCHITECTURES)}); use the remote backend"
        )
    audit_architecture, listing = _ARCHITECTURES[machine]
    numbers = {name: int(number) for name, number in (pair.split("=") for pair in listing.split())}
    program = _instruction(_LOAD, _OFFSET_ARCHITECTURE)
    program += _instruction(_JUMP_EQUAL, audit_architecture, 1, 0) + _instruction(_RETURN, _KILL_PROCESS)
    program += _instruction(_LOAD, _OFFSET_NUMBER)
    # Numbers from 2^30 on are the x32 ABI: the same calls under other numbers.
    program += _instruction(_JUMP_GE, 0x40000000, 0, 1) + _instruction(_RETURN, _KILL_PROCESS)
    program += _guard(numbers.pop("clone"), 0, [(_JUMP_SET, _NAMESPACE_FLAGS)], refuse_on_match=True)
    program += _guard(numbers.pop("socketpair"), 0, [(_JUMP_EQUAL, _AF_UNIX)], refuse_on_match=False)
    for name, (argument, values) in _FORBIDDEN_ARGUMENTS.items():
        tests = [(_JUMP_EQUAL, value) for value in values]
        program += _guard(numbers.pop(name), argument, tests, refuse_on_match=True)
    for number in sorted(numbers.values()):
        program += _instruction(_JUMP_EQUAL, number, 0, 1) + _instruction(_RETURN, _ALLOW)
    return program + _instruction(_RETURN, _ERRNO | errno.ENOSYS)
