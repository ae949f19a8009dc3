"""Runs in the sandbox: the answer as a main program, fed by standard input."""

import sys
import types

_NOT_COMPILED = 117


def _main():
    libraries, sys.argv = sys.argv[1:], ["answer.py"]
    sys.path[:] = [path for path in sys.path if path] + libraries
    with open("/box/answer.py", "rb") as handle:
        source = handle.read()
    getattr(sys, "set_int_max_str_digits", id)(0)  # judges print longer integers; the clock is the limit
    try:
        code = compile(source, "answer.py", "exec")
    except (SyntaxError, ValueError, MemoryError, RecursionError, OverflowError) as error:
        sys.stderr.write("%s: %s" % (type(error).__name__, error))
        sys.stderr.flush()
        import os

        os._exit(_NOT_COMPILED)
    import _sitebuiltins
    import builtins

    builtins.exit = _sitebuiltins.Quitter("exit", "Ctrl-D")
    builtins.quit = _sitebuiltins.Quitter("quit", "Ctrl-D")
    module = types.ModuleType("__main__")
    module.__builtins__ = builtins
    sys.modules["__main__"] = module
    exec(code, module.__dict__)


_main()
