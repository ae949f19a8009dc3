"""Attacks as answers to a task whose expected value is a secret: `solve()` must return what only the tests know.

Each returns the gold if (and only if) it got at it, or a sign of success that the host is checked for. Placeholders:
MARK (a name looked for on the host), FILE (a world-writable host file that holds the gold), PORT, ABSTRACT (listening
sockets).
"""

from __future__ import annotations

from dataclasses import dataclass

from r1mega.sandbox import Verdict

BLOCKED = (Verdict.WRONG_ANSWER, Verdict.RUNTIME_ERROR)
X32 = 0x40000000  # the other numbering of the same calls; the filter kills for it
EXHAUSTED = (Verdict.TIME_LIMIT, Verdict.MEMORY_LIMIT, Verdict.RUNTIME_ERROR, Verdict.CRASHED)


@dataclass(frozen=True, slots=True)
class Attack:
    """tests: what the grader runs; None for the usual equality with the gold."""

    name: str
    source: str
    verdicts: tuple[Verdict, ...]
    tests: str | None = None


def in_solve(name: str, body: str, *verdicts: Verdict, tests: str | None = None) -> Attack:
    lines = "\n".join("    " + line for line in body.strip().splitlines())
    return Attack(name, f"import ctypes, os, sys, time\ndef solve(*_):\n{lines}\n", verdicts or BLOCKED, tests)


def raw(name: str, number: int, *arguments: str) -> Attack:
    """A system call by its x86-64 number. Let through, it would make the answer a wrong one instead of an error."""
    body = f"""
libc = ctypes.CDLL(None, use_errno=True)
result = libc.syscall({", ".join([str(number), *arguments])})
assert result >= 0, os.strerror(ctypes.get_errno())
return 'SYSTEM CALL ALLOWED'
"""
    return in_solve(name, body, Verdict.CRASHED if number >= X32 else Verdict.RUNTIME_ERROR)


BOMBS = [
    in_solve(  # which limit it meets first, of time or of memory, is a matter of speed
        "fork bomb",
        "while True:\n    try: os.fork()\n    except OSError: pass",
        Verdict.TIME_LIMIT,
        Verdict.MEMORY_LIMIT,
    ),
    in_solve(
        "exec bomb",
        "import subprocess\nwhile True:\n    try: subprocess.Popen(['/bin/sh', '-c', 'sleep 9'])\n"
        "    except OSError: pass",
        Verdict.TIME_LIMIT,
    ),
    in_solve(
        "thread bomb",
        "import threading\nwhile True:\n    threading.Thread(target=time.sleep, args=(60,)).start()",
        *EXHAUSTED,
    ),
    in_solve("memory bomb", "hoard = []\nwhile True: hoard.append(bytes([1]) * (1 << 20))", Verdict.MEMORY_LIMIT),
    in_solve("memory bomb at once", "return bytearray(1 << 40)", Verdict.MEMORY_LIMIT),
    in_solve(
        "memory bomb of children",
        "for _ in range(4): os.fork()\nhoard = bytes([1]) * (40 << 20)\ntime.sleep(9)",
        Verdict.MEMORY_LIMIT,
        Verdict.TIME_LIMIT,
    ),
    in_solve(
        "shared anonymous memory bomb",
        "import mmap\nkept = []\nwhile True:\n    m = mmap.mmap(-1, 8 << 20)\n"
        "    m.write(bytes([1]) * (8 << 20))\n    kept.append(m)",
        Verdict.MEMORY_LIMIT,
        Verdict.RUNTIME_ERROR,
    ),
    in_solve(
        "memfd bomb",
        "kept = []\nwhile True:\n    fd = os.memfd_create('x')\n    os.write(fd, b'x' * (4 << 20))",
        Verdict.RUNTIME_ERROR,
    ),
    in_solve(
        "/dev/shm bomb",
        "n = 0\nwhile True:\n    open('/dev/shm/MARK%d' % n, 'wb').write(b'x' * (1 << 20))\n    n += 1",
        Verdict.RUNTIME_ERROR,
    ),
    in_solve(
        "disk bomb",
        "n = 0\nwhile True:\n    open('/tmp/MARK%d' % n, 'wb').write(b'x' * (1 << 20))\n    n += 1",
        Verdict.RUNTIME_ERROR,
    ),
    in_solve(
        "one giant file",
        "open('/tmp/MARK', 'wb').truncate(1 << 40)",
        Verdict.RUNTIME_ERROR,
        Verdict.CRASHED,
        Verdict.EARLY_EXIT,
    ),
    in_solve("many small files", "n = 0\nwhile True:\n    open('/tmp/%d' % n, 'w').close()\n    n += 1", *EXHAUSTED),
    in_solve(
        "pipe bomb",
        "kept = []\nwhile True:\n    r, w = os.pipe()\n    os.write(w, b'x' * 65536)",
        Verdict.RUNTIME_ERROR,
    ),
    in_solve("endless output", "while True: print('x' * 9999)", Verdict.OUTPUT_LIMIT),
    in_solve("endless errors", "while True: os.write(2, b'x' * 9999)", Verdict.OUTPUT_LIMIT),
    in_solve(
        "endless output of a child",
        "if os.fork() == 0:\n    while True: os.write(1, b'x' * 9999)\ntime.sleep(60)",
        Verdict.OUTPUT_LIMIT,
    ),
    in_solve(
        "ignored signals",
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        Verdict.TIME_LIMIT,
    ),
    in_solve("sleep", "time.sleep(1000)", Verdict.TIME_LIMIT),
    in_solve("huge power", "return 10 ** 10 ** 10 ** 10", Verdict.TIME_LIMIT, Verdict.MEMORY_LIMIT),
    in_solve("giant integer returned", "return 1 << (1 << 28)", Verdict.OUTPUT_LIMIT, Verdict.MEMORY_LIMIT),
    in_solve("giant text returned", "return 'x' * (40 << 20)", Verdict.OUTPUT_LIMIT, Verdict.MEMORY_LIMIT),
    in_solve("endless iterator returned", "import itertools\nreturn itertools.count()", *BLOCKED),
    in_solve(
        "deep recursion", "sys.setrecursionlimit(10 ** 9)\ndef f(n): return f(n + 1) + 1\nreturn f(0)", *EXHAUSTED
    ),
    in_solve(
        "deep recursion in C",
        "sys.setrecursionlimit(10 ** 9)\nx = []\nfor _ in range(10 ** 6): x = [x]\nrepr(x)",
        *EXHAUSTED,
    ),
    in_solve("deeply nested value", "x = []\nfor _ in range(10 ** 5): x = [x]\nreturn x", *BLOCKED),
    in_solve(
        "endless __str__ of an exception",
        "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E()",
        Verdict.TIME_LIMIT,
    ),
]

ENDINGS = [
    Attack(
        "daemon that outlives its parent",
        "import ctypes, os, time\ndef solve():\n    if os.fork() == 0:\n        os.setsid()\n"
        "        if os.fork() == 0:\n"
        "            ctypes.CDLL(None).prctl(15, b'MARK')\n            time.sleep(600)\n        os._exit(0)\n"
        "    os._exit(0)\n",
        (Verdict.EARLY_EXIT,),
    ),
    Attack("early exit while loading", "import os\nos._exit(0)\n", (Verdict.EARLY_EXIT,)),
    in_solve("early exit in the call", "os._exit(0)", Verdict.EARLY_EXIT),
    in_solve("sys.exit", "sys.exit(0)", Verdict.EARLY_EXIT),
    in_solve("exit at exit", "import atexit\natexit.register(os._exit, 0)\nraise SystemExit", Verdict.EARLY_EXIT),
    in_solve(
        "kill everyone",
        "try: os.kill(-1, 9)\nexcept OSError: pass\nos.kill(os.getpid(), 9)",
        Verdict.CRASHED,
        Verdict.EARLY_EXIT,
    ),
    in_solve(
        "kill the parent", "for pid in (1, os.getppid()): os.kill(pid, 9)\nreturn 'survived'", *BLOCKED, Verdict.CRASHED
    ),
    in_solve("segmentation fault", "ctypes.string_at(0)", Verdict.CRASHED),
    in_solve("abort", "os.abort()", Verdict.CRASHED),
]

READING = [
    in_solve("read a host file", "return open('FILE').read()"),
    in_solve("read it through /proc/1/root", "return open('/proc/1/root/FILE').read()"),
    in_solve("read it through a symlink", "os.symlink('FILE', '/tmp/l')\nreturn open('/tmp/l').read()"),
    in_solve(
        "read it through every process",
        "for pid in os.listdir('/proc'):\n    for way in ('root', 'cwd'):\n"
        "        try: return open('/proc/%s/%s/FILE' % (pid, way)).read()\n        except OSError: pass",
    ),
    in_solve(
        "read it through descriptors",
        "for fd in range(3, 256):\n    try: return open('/proc/self/fd/%d/../../../FILE' % fd).read()\n"
        "    except OSError: pass\n    try: return os.fdopen(os.open('FILE', 0, dir_fd=fd)).read()\n"
        "    except OSError: pass",
    ),
    in_solve(
        "open by handle",
        "libc = ctypes.CDLL(None)\nfd = libc.syscall(304, 3, b'\\0' * 128, 0)\nassert fd >= 0\n"
        "return os.read(fd, 99).decode()",
    ),
    in_solve("read the environment", "return os.environ.get('HOST_SECRET') or open('/proc/1/environ').read()"),
    in_solve(
        "read everyone's environment",
        "for pid in os.listdir('/proc'):\n    try:\n        if 'GOLD' in open('/proc/%s/environ' % pid).read():\n"
        "            return 'GOLD seen'\n    except OSError: pass",
    ),
    in_solve(
        "read other answers",
        "import glob\n"
        "texts = [p for p in glob.glob('/box/*') + glob.glob('/tmp/*') + glob.glob('/proc/[0-9]*/cmdline')]\n"
        "for path in texts:\n    try:\n"
        "        if 'NEIGHBOUR' in open(path, errors='replace').read(): return 'GOLD seen'\n    except OSError: pass",
    ),
    in_solve(
        "find the tests in memory",
        "import gc, re\nfor thing in gc.get_objects() + [f.f_locals for f in sys._current_frames().values()]:\n"
        "    try: found = re.search('GOLD[0-9a-f]{32}', repr(thing))\n    except Exception: continue\n"
        "    if found: return found.group()",
    ),
    in_solve(
        "find the tests in raw memory",
        "import re\nmem = open('/proc/self/mem', 'rb', 0)\nfor line in open('/proc/self/maps'):\n"
        "    if ' rw' not in line: continue\n    a, b = [int(x, 16) for x in line.split()[0].split('-')]\n    try:\n"
        "        mem.seek(a)\n"
        "        found = re.search(b'GOLD[0-9a-f]{32}', mem.read(min(b - a, 8 << 20)))\n"
        "    except (OSError, ValueError, OverflowError): continue\n"
        "    if found: return found.group().decode()",
    ),
]

GRADER = [
    in_solve("overwrite the grader's files", "open('/box/agent.py', 'w').write('MARK')", Verdict.RUNTIME_ERROR),
    in_solve("replace the grader's files", "os.rename('/box/agent.py', '/box/MARK')", Verdict.RUNTIME_ERROR),
    in_solve(
        "patch builtins",
        "import builtins\nfor name in ('len', 'isinstance', 'all', 'any', 'repr', 'type', 'abs'):\n"
        "    setattr(builtins, name, lambda *a, **k: True)\nreturn True",
        *BLOCKED,
        Verdict.TAMPERING,
        Verdict.EARLY_EXIT,
    ),
    in_solve("patch the agent", "agent = sys.modules['__main__']\nagent.encode = lambda *a: True\nreturn 1"),
    in_solve(
        "patch json", "import json\njson.dumps = lambda *a, **k: '{\"value\": true}'\nreturn 1", Verdict.TAMPERING
    ),
    in_solve(
        "always equal",
        "class Equal:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
        "    def __bool__(self): return True\n    __hash__ = None\nreturn Equal()",
    ),
    in_solve("always equal text", "class Equal(str):\n    def __eq__(self, other): return True\nreturn Equal('x')"),
    in_solve(
        "a class that lies about itself",
        "class Liar:\n    __class__ = property(lambda self: str)\n    def __eq__(self, o): return True\nreturn Liar()",
    ),
    in_solve(
        "forged replies",
        'for fd in range(3, 64):\n    try: os.write(fd, b\'{"number": "0", "value": true}\\n\' * 3)\n'
        "    except OSError: pass\nreturn 1",
        Verdict.TAMPERING,
    ),
    Attack(
        "replies before any question",
        'import os\nfor fd in range(3, 64):\n    try: os.write(fd, b\'{"load": "ok"}\\n\')\n    except OSError: pass\n',
        (Verdict.TAMPERING,),
    ),
    in_solve("two processes reply", "os.fork()\nreturn 1", Verdict.TAMPERING, Verdict.WRONG_ANSWER),
    in_solve("closed reply channel", "os.closerange(3, 64)\ntime.sleep(60)", Verdict.TAMPERING, Verdict.TIME_LIMIT),
    in_solve(
        "nested junk as a reply",
        "for fd in range(3, 64):\n    try: os.write(fd, b'[' * 200000 + b'\\n')\n    except OSError: pass\n"
        "time.sleep(60)",
        Verdict.TAMPERING,
        Verdict.TIME_LIMIT,
    ),
    in_solve(
        "StopIteration ends the tests' loop",
        "raise StopIteration",
        Verdict.RUNTIME_ERROR,
        tests="assert all(map(lambda gold: solve() == gold, ['GOLD']))",
    ),
    in_solve("exception that is everything", "raise KeyboardInterrupt", Verdict.RUNTIME_ERROR),
    in_solve(
        "pickle bomb returned", "class B:\n    def __reduce__(self): return os.system, ('touch /tmp/MARK',)\nreturn B()"
    ),
    in_solve("not a number", "return float('nan')", Verdict.WRONG_ANSWER, tests="assert abs(solve() - 1) < 1e-6"),
]

SYSTEM = [
    in_solve(
        "network",
        "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)\nreturn 'connected'",
        Verdict.RUNTIME_ERROR,
    ),
    in_solve("name lookup", "import socket\nreturn socket.getaddrinfo('localhost', 80) and 'resolved'", *BLOCKED),
    in_solve(
        "abstract unix socket",
        "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0ABSTRACT')\nreturn 'connected'",
        Verdict.RUNTIME_ERROR,
    ),
    in_solve("netlink", "import socket\nsocket.socket(16, 3)\nreturn 'opened'", Verdict.RUNTIME_ERROR),
    raw("io_uring", 425, "8", "ctypes.create_string_buffer(256)"),
    raw("ptrace", 101, "16", "os.getppid()", "0", "0"),
    raw("process_vm_readv", 310, "1", "0", "0", "0", "0", "0"),
    raw("bpf", 321, "0", "ctypes.create_string_buffer(128)", "128"),
    raw("userfaultfd", 323, "1"),
    raw("keyring", 250, "0", "-3", "0"),
    raw("shared memory segment", 29, "0", "1 << 26", "0o1600"),
    raw("message queue", 240, "b'x'", "0o102", "0o600", "0"),
    raw("mount", 165, "b'none'", "b'/tmp'", "b'tmpfs'", "0", "0"),
    raw("chroot", 161, "b'/tmp'"),
    raw("nested user namespace", 272, "0x10000000"),
    raw("nested namespace by clone", 56, "0x10000000 | 17", "0", "0", "0", "0"),
    raw("clone3", 435, "ctypes.create_string_buffer(b'\\0' * 88)", "88"),
    raw("join a namespace", 308, "0", "0"),
    raw("kernel module", 313, "0", "b''", "0"),
    raw("reboot", 169, "0xfee1dead", "672274793", "0", "0"),
    raw("socket by the x32 numbers", X32 | 41, "1", "1", "0"),
    in_solve(
        "write core_pattern",
        "os.write(os.open('/proc/sys/kernel/core_pattern', 1), b'|/tmp/MARK')\nreturn 'wrote'",
        Verdict.RUNTIME_ERROR,
    ),
    in_solve("write sysrq", "os.write(os.open('/proc/sysrq-trigger', 1), b'h')\nreturn 'wrote'", Verdict.RUNTIME_ERROR),
    in_solve(
        "write the uid map",
        "os.write(os.open('/proc/self/uid_map', 1), b'0 0 1')\nreturn 'wrote'",
        Verdict.RUNTIME_ERROR,
    ),
    in_solve(
        "spare oneself from the killer",
        "os.write(os.open('/proc/self/oom_score_adj', 1), b'-1000')\nreturn 'wrote'",
        Verdict.RUNTIME_ERROR,
    ),
    in_solve(
        "write the root",
        "wrote = []\nfor place in ('/', '/usr/bin', '/dev', '/box', '/run', '/var/tmp', '/proc'):\n"
        "    try: wrote.append(open(place + '/MARK', 'w'))\n    except OSError: pass\nassert wrote\nreturn 'wrote'",
        Verdict.RUNTIME_ERROR,
    ),
    in_solve("device node", "os.mknod('/tmp/d', 0o60666, os.makedev(8, 0))\nreturn 'made'", Verdict.RUNTIME_ERROR),
    in_solve(
        "set-uid shell",
        "import shutil, subprocess\nshutil.copy('/bin/sh', '/tmp/s')\nos.chmod('/tmp/s', 0o4755)\n"
        "return subprocess.run(['/tmp/s', '-c', 'cat FILE'], capture_output=True, text=True).stdout",
    ),
    in_solve("become root", "os.setuid(0)\nreturn 'root'", Verdict.RUNTIME_ERROR),
    in_solve(
        "lift the limits",
        "import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (9999, 9999))\nreturn 'lifted'",
        Verdict.RUNTIME_ERROR,
    ),
    in_solve(
        "type into the terminal",
        "import fcntl\nfcntl.ioctl(os.open('/dev/tty', 2), 0x5412, b'x')\nreturn 'typed'",
        Verdict.RUNTIME_ERROR,
    ),
    in_solve(
        "type into a terminal of one's own",
        "import fcntl, pty\nm, s = pty.openpty()\nfcntl.ioctl(s, 0x5412, b'x')\nreturn 'typed'",
        Verdict.RUNTIME_ERROR,
    ),
]

SOURCES = [
    Attack("NUL in the source", "def solve():\n    return '\0'\n", (Verdict.COMPILE_ERROR,)),
    Attack("lone surrogate in the source", "def solve():\n    return '\udc80'\n", (Verdict.COMPILE_ERROR,)),
    Attack("look-alike name", "def s\u043elve():\n    return 1\n", (Verdict.RUNTIME_ERROR,)),
    Attack(
        "right-to-left override", "def solve():\n    return 'x' \u202e # eulav\n", (Verdict.COMPILE_ERROR, *BLOCKED)
    ),
    Attack(
        "nested source",
        "def solve():\n    return " + "(" * 100000 + ")" * 100000,
        (Verdict.COMPILE_ERROR, Verdict.MEMORY_LIMIT, Verdict.CRASHED),
    ),
    Attack(
        "endless constant folding",
        "def solve():\n    return " + "-" * 200000 + "1",
        (Verdict.COMPILE_ERROR, Verdict.CRASHED, Verdict.MEMORY_LIMIT),
    ),
    Attack("coding cookie", "# coding: rot13\nqrs fbyir(): erghea 1\n", (Verdict.COMPILE_ERROR, *BLOCKED)),
    Attack("empty", "\n\n", (Verdict.NO_CODE,)),
]

ATTACKS = [*BOMBS, *ENDINGS, *READING, *GRADER, *SYSTEM, *SOURCES]
