"""Runs in the grader's sandbox: executes the tests, with stand-ins for the names of the answer.

Comparisons happen here, between values that have become plain built-in types, so an answer's own __eq__, its patched
builtins and its frames never meet a test.
"""

import ast
import builtins
import fractions
import hashlib
import importlib
import json
import math
import os
import sys
import types

from wire import Unsendable, decode, encode


class Ended(BaseException):
    """No further test is to run: the answer is gone, or one failure is enough."""


class Tampered(Ended):
    """A reply that cannot have come from the agent."""


class AnswerError(Exception):
    """An exception of a type that only the answer knows."""


class Line:
    """The way to the answer: one request, one reply that repeats the request's number.

    Numbers follow from the seed, which the answer does not know, so that it cannot reply before it is asked; and the
    same seed gives the same ones, so that a session can be repeated.
    """

    def __init__(self, exchange, seed):
        self._exchange, self._seed, self._count = exchange, seed, 0

    def ask(self, do, on, arguments=(), keywords=None, nodes=None):
        """nodes: what of a call are linked nodes (answer.with_nodes)."""
        self._count += 1
        number = hashlib.sha256(("%s %d" % (self._seed, self._count)).encode()).hexdigest()[:16]
        request = {"number": number, "do": do, "on": on, "nodes": nodes}
        request["arguments"] = [encode(value, number_of) for value in arguments]
        request["keywords"] = {name: encode(value, number_of) for name, value in (keywords or {}).items()}
        text = self._exchange(json.dumps(request))
        if text is None:
            raise Ended("the answer is gone")
        try:
            reply = json.loads(text)
            if not isinstance(reply, dict) or reply.get("number") != number:
                raise ValueError("not a reply to this request")
            if "value" in reply:
                return decode(reply["value"], lambda identity: StandIn(self, identity))
        except (ValueError, RecursionError) as error:
            raise Tampered("forged reply: %s" % error) from None
        if "exit" in reply:
            raise Ended("exit: " + str(reply["exit"]))
        if "unsendable" in reply:
            raise TypeError("returned a value that cannot be compared: " + str(reply["unsendable"]))
        raise remote_exception(reply)


def remote_exception(reply):
    """The answer's exception as one of ours. Those that steer control flow (StopIteration would end a test's loop early
    and pass `all(map(...))`) become plain RuntimeErrors."""
    name, message = str(reply.get("raise")), str(reply.get("message"))
    kind = getattr(builtins, name, None)
    if name in ("StopIteration", "StopAsyncIteration"):
        kind = RuntimeError
    try:
        error = kind(message) if isinstance(kind, type) and issubclass(kind, Exception) else AnswerError(message)
    except TypeError:  # UnicodeDecodeError and its like want five arguments
        error = AnswerError(message)
    error.from_answer = message
    return error


def number_of(value):
    """What a stand-in stands for; a test's own objects cannot be sent."""
    if isinstance(value, StandIn):
        return object.__getattribute__(value, "_on")
    raise Unsendable("the test passes a %s, which cannot be sent to the answer" % type(value).__name__)


class StandIn:
    """A name (text) or an object (number) of the answer. Equality is identity: the answer's own __eq__ is never
    asked."""

    def __init__(self, line, on):
        object.__setattr__(self, "_line", line)
        object.__setattr__(self, "_on", on)

    def __call__(self, *arguments, **keywords):
        return self._line.ask("call", self._on, arguments, keywords)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._line.ask("get", self._on, (name,))

    def __setattr__(self, name, value):
        self._line.ask("set", self._on, (name, value))

    def __getitem__(self, key):
        return self._line.ask("item", self._on, (key,))

    def __len__(self):
        return self._line.ask("len", self._on)

    def __bool__(self):
        return True

    def __iter__(self):
        return iter(self._line.ask("iter", self._on))

    def __str__(self):
        return self._line.ask("str", self._on)


class Tally:
    """Counts assertions. stop_at_failure: one failure ends the tests."""

    def __init__(self, stop_at_failure):
        self.num_passed, self.num_failed, self.first, self._stop = 0, 0, None, stop_at_failure

    def passed(self):
        self.num_passed += 1

    def failed(self, error, where):
        self.num_failed += 1
        self.note(error, where)
        if self._stop:
            raise Ended("failed")

    def note(self, error, where):
        if self.first is not None:
            return
        from_answer = getattr(error, "from_answer", None)
        kind = "answer" if from_answer else "assertion"
        if isinstance(error, Unsendable) or (isinstance(error, ImportError) and not from_answer):
            kind = "test"
        text = from_answer or ("" if isinstance(error, AssertionError) else type(error).__name__ + ": ")
        self.first = {"kind": kind, "message": (text + ("" if from_answer else str(error)))[:300], "where": where[:300]}


class Counted(ast.NodeTransformer):
    """Wraps every assertion that can fail so that its outcome is counted."""

    def __init__(self):
        self.num_assertions = 0

    def visit_Assert(self, node):
        if isinstance(node.test, ast.Constant):  # `assert True` proves nothing
            return node
        self.num_assertions += 1
        template = "try:\n pass\n __tally__.passed()\nexcept Exception as __error__:\n __tally__.failed(__error__, %r)"
        wrapped = ast.parse(template % ast.get_source_segment(self.source, node)).body[0]
        wrapped.body[0] = node
        return ast.fix_missing_locations(ast.copy_location(wrapped, node))


def names_in(tree):
    """(names read, names bound, names read only as `name.attribute`) anywhere in the tests."""
    read, bound, bases, others = set(), set(), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            bound.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            bases.add(node.value.id)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Name) and not isinstance(node, ast.Attribute):
                others.add(child.id)
    return read, bound, bases - others


def bind(namespace, tree, entry, line):
    """Give every free name of the tests its meaning: a module of ours, or a stand-in for the answer's.

    Built-in names are ours, whatever the answer calls its functions; if the tests call nothing else, the first name
    that they call is the answer's (a task may well ask for a function called `sum`).
    """
    read, bound, bases = names_in(tree)
    free = {name for name in read - bound if name not in namespace and not hasattr(builtins, name)}
    for name in sorted(free & bases):
        if name in getattr(sys, "stdlib_module_names", sys.builtin_module_names + ("math", "re", "string")):
            namespace[name] = importlib.import_module(name)
            free.discard(name)
    remote = set(free)
    if entry:
        remote.add(entry)
    elif not free:
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        shadowed = [call for call in calls if call.id not in bound]
        if shadowed:
            remote.add(min(shadowed, key=lambda call: (call.lineno, call.col_offset)).id)
    for name in remote:
        namespace[name] = StandIn(line, name)


def run_assertions(spec, line):
    """Outcome of an assert block: counts, the first failure, whether it ran to its end."""
    tally, counted = Tally(spec["stop_at_failure"]), Counted()
    module = types.ModuleType("tests")
    sys.modules["tests"] = module
    namespace = module.__dict__
    namespace["__tally__"] = tally
    outcome = {"ended": "whole"}
    try:
        exec(compile(spec["context"], "context", "exec"), namespace)
        counted.source = spec["tests"]
        tree = ast.parse(spec["tests"])
        bind(namespace, tree, spec["entry"], line)
        tree = counted.visit(tree)
        exec(compile(tree, "tests", "exec"), namespace)
    except Tampered as error:
        outcome = {"ended": "tampering", "message": str(error)}
    except Ended as error:
        outcome = {"ended": "early", "message": str(error)}
    except BaseException as error:
        outcome = {"ended": "raised"}
        tally.note(error, "outside of an assertion")
        tally.num_failed += 1
    outcome.update(num_passed=tally.num_passed, num_failed=tally.num_failed, first=tally.first)
    outcome["num_assertions"] = counted.num_assertions
    return outcome


def alike(actual, expected, tolerance):
    """Whether a returned value equals one from a JSON file, where tuples are lists and every key is text."""
    if isinstance(actual, (list, tuple)) and isinstance(expected, (list, tuple)):
        return len(actual) == len(expected) and all(alike(a, e, tolerance) for a, e in zip(actual, expected))
    if isinstance(actual, dict) and isinstance(expected, dict):
        keyed = {key if isinstance(key, str) else str(key): value for key, value in actual.items()}
        return keyed.keys() == expected.keys() and all(alike(keyed[key], expected[key], tolerance) for key in keyed)
    if isinstance(actual, (set, frozenset)) and isinstance(expected, list):
        return len(actual) == len(expected) and all(item in actual for item in expected)
    if isinstance(actual, bool) != isinstance(expected, bool):
        return False
    if isinstance(actual, (int, float)) and isinstance(expected, (int, float)):
        return near(actual, expected, tolerance)
    return type(actual) is not StandIn and actual == expected


def near(actual, expected, tolerance):
    """Two integers are equal; an integer beside a float is its value, up to the absolute tolerance (1e15 + 2 is not
    10**15); two floats are near, absolutely or relatively."""
    floats = isinstance(actual, float) + isinstance(expected, float)
    if floats == 0 or actual == expected:
        return actual == expected
    if floats == 2:
        return math.isclose(actual, expected, rel_tol=tolerance, abs_tol=tolerance)
    value, number = (actual, expected) if isinstance(actual, float) else (expected, actual)
    return math.isfinite(value) and abs(fractions.Fraction(value) - number) <= tolerance


def run_case(spec, case, line):
    """None if the case passes, else what was wrong."""
    nodes = spec.get("nodes")
    case = {name: decode(form, None) for name, form in case.items()}
    try:
        actual = line.ask("call", spec["entry"], case["arguments"], case["keywords"], nodes)
        if nodes and nodes["result"] and case["expected"] is None:
            case["expected"] = []
        expected = [case["expected"], *(case["expected"] if case["wrapped"] else ())]
        if any(alike(actual, value, spec["tolerance"]) for value in expected):
            return None
        return {"kind": "assertion", "message": "returned %.200r, expected %.200r" % (actual, case["expected"])}
    except Exception as error:
        tally = Tally(False)
        tally.note(error, "")
        return tally.first


def run_cases(spec, line):
    """Outcome of function calls: one entry for each case that came to an end, in order."""
    results, outcome = [], {"ended": "whole"}
    try:
        for case in spec["cases"]:
            results.append(run_case(spec, case, line))
            if results[-1] and spec["stop_at_failure"]:
                break
    except Tampered as error:
        outcome = {"ended": "tampering", "message": str(error)}
    except Ended as error:
        outcome = {"ended": "early", "message": str(error)}
    outcome["results"] = results
    return outcome


def grade(spec, exchange):
    line = Line(exchange, spec["nonce"])
    return run_cases(spec, line) if "cases" in spec else run_assertions(spec, line)


def main():
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)
    os.dup2(0, 2)

    def send(kind, text):
        data = kind + text.encode() + b"\n"
        while data:
            data = data[os.write(outgoing, data) :]

    def exchange(text):
        send(b"C", text)
        reply = incoming.readline()
        if not reply:
            os._exit(0)  # no more input: whoever runs us will come back with the reply
        return reply if len(reply) > 1 else None  # an empty line: the answer is gone

    getattr(sys, "set_int_max_str_digits", id)(0)  # tests may hold longer integers; the clock is the limit
    spec = json.loads(incoming.readline())
    outcome = grade(spec, exchange)
    outcome["nonce"] = spec["nonce"]
    send(b"V", json.dumps(outcome))


if __name__ == "__main__":
    main()
