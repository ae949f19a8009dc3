"""Runs in the answer's sandbox: loads the answer, then does what the grader asks, one request at a time.

The answer shares this process and may take it over; all it wins is to choose the values that it returns, which is what
an answer does anyway. It never sees what they are compared with.
"""

import _sitebuiltins
import builtins
import itertools
import json
import os
import sys
import types

from wire import MAX_ITERATED, Unsendable, decode, encode


class Objects:
    """What stays here: id -> object. Ids count up, so that a rerun gives the same ones."""

    def __init__(self, names):
        self._names = names
        self._by_id = {}
        self._ids = itertools.count()

    def keep(self, value):
        number = next(self._ids)
        self._by_id[number] = value
        return number

    def get(self, identity):
        """An object by its id; by its name (text) a global of the answer, or a method of its class Solution."""
        if isinstance(identity, int):
            return self._by_id[identity]
        if identity in self._names:
            return self._names[identity]
        solution = self._names.get("Solution")
        if solution is not None and hasattr(solution, identity):
            return getattr(solution(), identity)
        raise NameError("name %r is not defined by the answer" % identity)


def load(source, libraries):
    """(module, None) or (None, why not)."""
    sys.path[:] = [path for path in sys.path if path != "/box"] + list(libraries)
    sys.argv = ["answer.py"]
    builtins.exit = _sitebuiltins.Quitter("exit", "Ctrl-D")
    builtins.quit = _sitebuiltins.Quitter("quit", "Ctrl-D")
    module = types.ModuleType("answer")
    sys.modules["answer"] = module
    try:
        code = compile(source, "answer.py", "exec")
    except (SyntaxError, ValueError, MemoryError, RecursionError, OverflowError) as error:
        return None, {"load": "compile_error", "message": describe(error)}
    try:
        exec(code, module.__dict__)
    except SystemExit as error:
        return None, {"load": "early_exit", "message": "exited with %r while loading" % (error.code,)}
    except MemoryError:
        return None, {"load": "memory_limit", "message": "MemoryError while loading"}
    except BaseException as error:
        return None, {"load": "runtime_error", "message": describe(error)}
    return module, None


def describe(error):
    """Type and message of an exception, whatever its __str__ does."""
    try:
        return ("%s: %s" % (type(error).__name__, error))[:300]
    except BaseException:
        return type(error).__name__


def with_nodes(kind, value, kinds):
    """A list as LeetCode's ListNode or (in level order, None for a missing child) TreeNode; `kind` may be a list of these.
    kinds: name -> class.
    """
    if kind.startswith("["):
        return [with_nodes(kind[1:-1], item, kinds) for item in value]
    if not value:
        return None
    make = kinds(kind)
    nodes = [None if item is None else make(item) for item in value]
    if kind == "ListNode":
        for node, after in zip(nodes, nodes[1:]):
            node.next = after
        return nodes[0]
    places = ((node, side) for node in nodes if node is not None for side in ("left", "right"))
    for child, (parent, side) in zip(nodes[1:], places):
        setattr(parent, side, child)
    return nodes[0]


def without_nodes(kind, value):
    """Inverse of `with_nodes`."""
    if kind.startswith("["):
        return [without_nodes(kind[1:-1], item) for item in value]
    found, nodes = [], [value]
    for node in nodes:  # the list grows while it is read
        if len(nodes) > MAX_ITERATED:
            raise Unsendable("more than %d nodes, or a cycle of them" % MAX_ITERATED)
        if node is not None:
            nodes.extend([node.next] if kind == "ListNode" else [node.left, node.right])
        found.append(None if node is None else node.val)
    while found and found[-1] is None:
        found.pop()
    return found


def perform(objects, request):
    """The reply to one request, without its number."""
    try:
        subject = objects.get(request["on"])
        arguments = [decode(form, objects.get) for form in request["arguments"]]
        keywords = {name: decode(form, objects.get) for name, form in request["keywords"].items()}
        operation = request["do"]
        nodes = request.get("nodes")
        if nodes:
            kinds = dict(nodes["parameters"])
            named = {**dict(zip([name for name, _ in nodes["parameters"]], arguments)), **keywords}
            named = {n: with_nodes(kinds[n], v, objects.get) if kinds.get(n) else v for n, v in named.items()}
            value = subject(*list(named.values())[: len(arguments)], **dict(list(named.items())[len(arguments) :]))
            value = without_nodes(nodes["result"], value) if nodes["result"] else value
        elif operation == "call":
            value = subject(*arguments, **keywords)
        elif operation == "get":
            value = getattr(subject, *arguments)
        elif operation == "set":
            value = setattr(subject, *arguments)
        elif operation == "item":
            value = subject[arguments[0]]
        else:
            value = {"len": len, "iter": list, "str": str}[operation](subject)
        return {"value": encode(value, objects.keep)}
    except SystemExit as error:
        return {"exit": "exited with %r" % (error.code,)}
    except Unsendable as error:
        return {"unsendable": str(error)}
    except BaseException as error:
        return {"raise": type(error).__name__, "message": describe(error)}


def respond(state, request):
    """Reply to one request; 'load' comes first and fills `state`."""
    if request["do"] == "load":
        # Lone surrogates reach the compiler as they are and are refused there.
        source = request["source"].encode("utf-8", "surrogatepass")
        module, refusal = load(source, request["libraries"])
        state["objects"] = Objects(vars(module) if module else {})
        reply = refusal or {"load": "ok"}
    else:
        reply = perform(state["objects"], request)
    reply["number"] = request["number"]
    return json.dumps(reply)


def main():
    requests, replies = os.fdopen(os.dup(0), "rb"), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)  # what the answer prints counts as output, not as a reply
    getattr(sys, "set_int_max_str_digits", id)(0)
    os.write(replies, b"hello\n")
    state = {}
    for line in requests:
        data = respond(state, json.loads(line)).encode() + b"\n"
        while data:
            data = data[os.write(replies, data) :]


if __name__ == "__main__":
    main()
