"""The remote backend against a real HTTP server that speaks SandboxFusion's /run_code and runs this machine's
sandbox."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from r1mega.errors import RewardError
from r1mega.reward.code import CodeReward
from r1mega.reward.code_problem import AssertBlock, CallCase, Problem, StreamCase
from r1mega.sandbox import Limits, LocalBackend, Verdict
from r1mega.sandbox.remote import RemoteBackend
from r1mega.types import RewardStatus

pytestmark = pytest.mark.heavy


def run_code(launcher, request):
    """A RunCodeResponse for a RunCodeRequest."""
    limits = Limits(
        wall_seconds=request["run_timeout"], memory_bytes=request["memory_limit_MB"] << 20, output_bytes=32 << 20
    )
    files = {f"/tmp/{name}": base64.b64decode(contents) for name, contents in request["files"].items()}
    compile_result = None
    if request["language"] == "cpp":
        built = LocalBackend(launcher, probe=False).compile(request["code"].encode())
        failed = built.stopped is not None
        compile_result = {
            "status": "Finished",
            "execution_time": built.wall_seconds,
            "return_code": int(failed),
            "stdout": "",
            "stderr": built.stderr.decode(),
        }
        if failed:
            return {
                "status": "Failed",
                "message": "",
                "compile_result": compile_result,
                "run_result": None,
                "files": {},
            }
        program, files = ["/tmp/main"], {"/tmp/main": built.stdout}
    else:
        program = [launcher.tools.python, "-B", "/tmp/main.py"]
        files["/tmp/main.py"] = request["code"].encode()
    done = launcher.run(program, limits, stdin=request["stdin"].encode(), files=files, executable_files=True)
    late = done.stopped is Verdict.TIME_LIMIT
    run_result = {
        "status": "TimeLimitExceeded" if late else "Finished",
        "execution_time": done.wall_seconds,
        "return_code": None if late else done.exit_code,
        "stdout": done.stdout.decode("utf-8", "replace"),
        "stderr": done.stderr.decode("utf-8", "replace"),
    }
    status = "Success" if done.exit_code == 0 else "Failed"
    return {"status": status, "message": "", "compile_result": compile_result, "run_result": run_result, "files": {}}


@pytest.fixture(scope="module")
def service(launcher):
    state = {"requests": [], "mode": "well"}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state["requests"].append(request)
            if state["mode"] == "well" and self.path == "/run_code":
                body = json.dumps(run_code(launcher, request)).encode()
            else:
                body = json.dumps({"status": "SandboxError", "message": "out of runners"}).encode()
            self.send_response(500 if state["mode"] == "down" else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def remote(service):
    return CodeReward(RemoteBackend(service[0]), Limits(wall_seconds=10.0, memory_bytes=256 << 20), partial_credit=True)


def verdict(reward, source, problem):
    scored = reward.score(source, problem)
    assert scored.status is RewardStatus.OK, scored
    return scored.value, scored.reason.split(":")[0]


def test_streams(remote):
    problem = Problem(stream_cases=(StreamCase("1 2\n", "3\n"), StreamCase("5 6\n", "11")))
    assert verdict(remote, "print(sum(map(int, input().split())))", problem) == (1.0, "passed")
    assert verdict(remote, "print(3)", problem) == (0.5, "wrong_answer")
    assert verdict(remote, "print(1 +", problem) == (0.0, "compile_error")
    assert verdict(remote, "1 / 0", problem) == (0.0, "runtime_error")
    single = Problem(stream_cases=problem.stream_cases[:1], time_limit=1.0)
    assert verdict(remote, "while True: pass", single) == (0.0, "time_limit")


def test_cpp(remote, launcher):
    if launcher.tools.compiler is None:
        pytest.skip("g++ missing: apt-get install -y g++")
    problem = Problem(language="cpp", stream_cases=(StreamCase("4", "8"),))
    source = "#include <iostream>\nint main() { int a; std::cin >> a; std::cout << 2 * a; }"
    assert verdict(remote, source, problem) == (1.0, "passed")
    assert verdict(remote, source.replace("2 * a", "2 * b"), problem) == (0.0, "compile_error")


def test_asserts_and_calls_with_tests_kept_from_the_answer(remote, service):
    tests = "seen = [f(n) for n in range(3)]\nassert seen == [0, 1, 4]\nassert f(12345) == 152399025, 'THE GOLD'"
    problem = Problem(assertions=AssertBlock("", tests))
    del service[1]["requests"][:]
    assert verdict(remote, "def f(n): return n * n", problem) == (1.0, "passed")
    with_answer = [request for request in service[1]["requests"] if "n * n" in request["stdin"]]
    assert len(with_answer) == 4 and len(service[1]["requests"]) == 9
    assert not any("THE GOLD" in json.dumps(request) or "152399025" in request["stdin"] for request in with_answer)
    assert verdict(remote, "def f(n): return n * n if n < 9 else 80", problem) == (0.5, "wrong_answer")
    calls = Problem(call_cases=tuple(CallCase((n,), {}, n * n) for n in range(3)), entry="f")
    assert verdict(remote, "class Solution:\n    def f(self, n): return n * n", calls) == (1.0, "passed")


def test_objects_survive_the_repetition(remote):
    source = "class Box:\n    def __init__(self, x): self.x = x\ndef add(box, n):\n    box.x += n\n    return box.x"
    problem = Problem(
        assertions=AssertBlock("", "b = Box(1)\nassert add(b, 2) == 3\nassert add(b, 2) == 5 and b.x == 5")
    )
    assert verdict(remote, source, problem) == (1.0, "passed")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import os\nos._exit(0)", "early_exit"),
        ("import os\ndef f(n): os._exit(0)", "early_exit"),
        ("def f(n): exit()", "early_exit"),
        ("def f(n): raise ValueError", "runtime_error"),
        ("def f(n", "compile_error"),
        (
            "import os\nfor fd in range(3, 64):\n  try: os.write(fd, b'{}\\n')\n  except OSError: pass\n"
            "def f(n): return 1",
            "tampering",
        ),
        ("class E:\n  def __eq__(self, other): return True\ndef f(n): return E()", "wrong_answer"),
        ("def f(n):\n  while True: pass", "time_limit"),
        ("def f(n): return bytearray(1 << 40)", "memory_limit"),
    ],
)
def test_attacks_are_named(remote, source, expected):
    problem = Problem(assertions=AssertBlock("", "assert f(1) == 'secret'"), time_limit=1.5)
    assert verdict(remote, source, problem) == (0.0, expected)


def test_a_failing_service_is_no_score(remote, service, monkeypatch):
    problem = Problem(stream_cases=(StreamCase("", "1"),))
    for mode in ("broken", "down"):
        monkeypatch.setitem(service[1], "mode", mode)
        scored = remote.score("print(1)", problem)
        assert (
            scored.value is None
            and scored.status is RewardStatus.FAILED
            and "run_code" in scored.reason
            or "runners" in scored.reason
        )
        with pytest.raises(RewardError, match="no usable service"):
            RemoteBackend(service[0])


def test_no_service():
    with pytest.raises(RewardError, match="no usable service at http://127.0.0.1:9 "):
        RemoteBackend("http://127.0.0.1:9/")
