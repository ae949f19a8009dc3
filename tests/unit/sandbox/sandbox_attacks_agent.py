"""More attacks as in `sandbox_attacks`: on the agent that shares the answer's process, on the grader through the values
that it is given, and with what is left running.
"""

from __future__ import annotations

from r1mega.sandbox import Verdict
from tests.unit.sandbox.sandbox_attacks import BLOCKED, EXHAUSTED, Attack, in_solve

_NUMBER = """
frame = sys._getframe()
while 'request' not in frame.f_locals: frame = frame.f_back
number = frame.f_locals['request']['number']
import json
def reply(**what):
    for fd in range(3, 64):
        try: os.write(fd, json.dumps(dict(number=number, **what)).encode() + b'\\n')
        except OSError: pass
"""


def with_number(name: str, body: str, *verdicts: Verdict, tests: str | None = None) -> Attack:
    """With the number of the request, taken from the agent's frames, and a function that replies in its place.

    A well-formed reply is the answer's value, a wrong one: what is told then depends on whether more lies in the pipe.
    """
    return in_solve(name, _NUMBER + body.strip(), *verdicts, tests=tests)


# Calls that no answer needs, by their x86-64 numbers: sockets, semaphores, message queues, System V and POSIX, mounts
# old and new, modules, clocks, priorities, other processes, memory that no limit counts.
_CALLS = (
    "41 42 43 46 47 49 50 288 299 307 64 65 68 69 71 240 241 242 155 167 163 179 428 429 430 431 432 433 442 175 176 "
    "246 320 159 164 170 171 172 173 227 305 144 203 251 314 434 438 440 424 448 300 301 253 254 294 303 447 275 276 "
    "278 237 238 239 256 279 248 249 298 312 317 444 445 446 135 154 136 103 134 139 180 212 216"
)

AGENT = [
    with_number("reply in the agent's place", "reply(value='x')\nreturn 'y'", Verdict.TAMPERING, Verdict.WRONG_ANSWER),
    with_number("reply for ever", "while True: reply(value='x')", *BLOCKED, Verdict.TAMPERING, Verdict.TIME_LIMIT),
    with_number("unknown kind of value", "reply(value={'eval': 'GOLD'})\ntime.sleep(60)", Verdict.TAMPERING),
    with_number("a value of two kinds", "reply(value={'set': [], 'int': '1'})\ntime.sleep(60)", Verdict.TAMPERING),
    with_number("unhashable set", "reply(value={'set': [[1]]})\ntime.sleep(60)", Verdict.TAMPERING),
    with_number(
        "built-in of the grader",
        "reply(value={'builtin': 'exec'})\ntime.sleep(60)",
        *BLOCKED,
        tests="assert solve()('raise SystemExit') == 'GOLD'",
    ),
    with_number(
        "end of the grader",
        "reply(value={'builtin': 'exit'})\ntime.sleep(60)",
        *BLOCKED,
        Verdict.TAMPERING,
        tests="assert solve()('GOLD') == 'GOLD'",
    ),
    with_number("reference to nothing", "reply(value={'@': {'a': 1}})\nreturn 1", *BLOCKED, Verdict.TAMPERING),
    with_number("nested value", "reply(value=eval('[' * 90 + ']' * 90))\ntime.sleep(60)", *BLOCKED, Verdict.TAMPERING),
    with_number(
        "exception that ends loops", "reply(**{'raise': 'GeneratorExit'})\ntime.sleep(60)", *BLOCKED, Verdict.TIME_LIMIT
    ),
    with_number(
        "a thread that goes on replying",
        "import threading\ndef flood():\n    while True: reply(value=1)\n"
        "threading.Thread(target=flood, daemon=True).start()\n"
        "time.sleep(60)",
        *BLOCKED,
        Verdict.TAMPERING,
    ),
    in_solve(
        "rewrite the agent's reply by a trace function",
        "def trace(frame, event, arg):\n    if 'reply' in frame.f_locals: frame.f_locals['reply']['value'] = True\n"
        "    return trace\nsys.settrace(trace)\nframe = sys._getframe()\n"
        "while frame: frame.f_trace = trace; frame = frame.f_back\nreturn 1",
        *BLOCKED,
        Verdict.TAMPERING,
    ),
    in_solve(
        "import hook",
        "class Hook:\n    def find_spec(self, *a): os._exit(0)\nsys.meta_path.insert(0, Hook())\n"
        "for name in ('json', 'wire', 'os'): sys.modules.pop(name, None)\nreturn 1",
        *BLOCKED,
        Verdict.EARLY_EXIT,
        Verdict.TAMPERING,
    ),
    in_solve(
        "overwrite small integers",
        "for n in range(-5, 256): ctypes.memset(id(n) + 24, 7, 1)\nreturn 7",
        *BLOCKED,
        *EXHAUSTED,
        Verdict.TAMPERING,
        Verdict.EARLY_EXIT,
        Verdict.OUTPUT_LIMIT,
    ),
    in_solve(
        "overwrite raw memory",
        "mem = open('/proc/self/mem', 'r+b', 0)\nfor line in open('/proc/self/maps'):\n"
        "    if ' rw' not in line: continue\n    a = int(line.split('-')[0], 16)\n    try:\n        mem.seek(a)\n"
        "        mem.write(b'GOLD' * 64)\n    except (OSError, ValueError, OverflowError): continue\nreturn 1",
        *BLOCKED,
        *EXHAUSTED,
        Verdict.EARLY_EXIT,
        Verdict.TAMPERING,
    ),
    in_solve(
        "equality that exits",
        "class E:\n    def __eq__(self, o): os._exit(0)\n    __ne__ = __hash__ = __bool__ = __eq__\nreturn E()",
    ),
    in_solve(
        "equality in a built-in container",
        "class E(int):\n    def __eq__(self, o): return True\n    __hash__ = int.__hash__\n"
        "class L(list):\n    def __eq__(self, o): return True\n    def __len__(self): return 1\n"
        "return L([E(1), {E(2): E(3)}, (E(4),)])",
    ),
    in_solve(
        "proxy of whatever it is compared with",
        "class P:\n    def __getattr__(self, name): return lambda *a, **k: a[0] if a else self\n"
        "    def __call__(self, *a): return True\nreturn P()",
    ),
    in_solve(
        "huge repr", "class R:\n    def __repr__(self): return 'x' * (1 << 31)\n    __str__ = __repr__\nreturn R()"
    ),
    in_solve(
        "huge text of an exception", "raise ValueError('x' * (1 << 40))", Verdict.MEMORY_LIMIT, Verdict.RUNTIME_ERROR
    ),
    in_solve(
        "exception that cannot be described",
        "class E(BaseException):\n    def __str__(self): os._exit(0)\nraise E()",
        Verdict.EARLY_EXIT,
    ),
    in_solve(
        "alarm in the agent",
        "import signal\nsignal.signal(signal.SIGALRM, lambda *a: os._exit(0))\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)\nreturn 1",
        *BLOCKED,
        Verdict.EARLY_EXIT,
    ),
    in_solve(
        "watchdog that exits",
        "import faulthandler\nfaulthandler.dump_traceback_later(0.1, exit=True)\ntime.sleep(60)",
        Verdict.EARLY_EXIT,
    ),
    in_solve("stop oneself", "import signal\nos.kill(os.getpid(), signal.SIGSTOP)\nreturn 1", Verdict.TIME_LIMIT),
    in_solve(
        "replies to nowhere",
        "null = os.open('/dev/null', 1)\nfor fd in range(3, 64):\n    if fd != null:\n        try: os.fstat(fd)\n"
        "        except OSError: continue\n        os.dup2(null, fd)\nreturn 1",
        Verdict.TAMPERING,
        Verdict.TIME_LIMIT,
        Verdict.EARLY_EXIT,
    ),
    in_solve(
        "the other end of the pipes",
        "text = b''\nfor fd in os.listdir('/proc/self/fd'):\n    for way in (0, 1):\n        try:\n"
        "            end = os.open('/proc/self/fd/' + fd, way | os.O_NONBLOCK)\n"
        "            text += os.read(end, 1 << 20) if way == 0 else b''\n"
        "            way == 1 and os.write(end, b'{}\\n')\n        except OSError: pass\n"
        "return text.decode(errors='replace')",
        *BLOCKED,
        Verdict.TAMPERING,
        Verdict.EARLY_EXIT,
    ),
    in_solve(
        "child that replies later",
        "if os.fork() == 0:\n    time.sleep(0.2)\n    for fd in range(3, 64):\n        try: os.write(fd, b'{}\\n')\n"
        "        except OSError: pass\n    os._exit(0)\nreturn 1",
        *BLOCKED,
        Verdict.TAMPERING,
    ),
    in_solve(
        "raise every limit",
        "import resource\nraised = []\nfor name in dir(resource):\n    if name.startswith('RLIMIT_'):\n"
        "        which = getattr(resource, name)\n        hard = resource.getrlimit(which)[1]\n"
        "        if hard == resource.RLIM_INFINITY: continue\n        try:\n"
        "            resource.setrlimit(which, (hard + 1, hard + 1))\n            raised.append(name)\n"
        "        except (OSError, ValueError): pass\nassert raised\nreturn raised",
        Verdict.RUNTIME_ERROR,
    ),
    in_solve(
        "a list of other system calls",
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        f"allowed = [n for n in map(int, '{_CALLS}'.split()) if libc.syscall(n, 0, 0, 0, 0, 0, 0) >= 0\n"
        "           or ctypes.get_errno() not in (1, 38)]\nassert allowed, 'none'\nreturn allowed",
        Verdict.RUNTIME_ERROR,
    ),
    in_solve(
        "leave a mess behind",
        "path = '/tmp'\nfor n in range(200):\n    path += '/MARK'\n    try: os.mkdir(path)\n    except OSError: break\n"
        "os.chmod('/tmp', 0)\nos.mkfifo('/tmp/MARK2') if os.access('/tmp', 2) else None\nraise OSError",
        Verdict.RUNTIME_ERROR,
    ),
]
