"""Values between the grader and the answer as JSON: data only, never code. Both ends run this; Python 3.8 and later.

Numbers, text, bytes, containers, iterators and views travel by value, as plain built-in types. Everything else stays
where it is and travels as a reference {"@": id}.
"""

import collections
import decimal
import fractions
import itertools
import types

MAX_DEPTH = 400
MAX_ITERATED = 200000


class Unsendable(Exception):
    """A value that has no form on the wire."""


def encode(value, reference, depth=0):
    """JSON-able form. reference(value) gives the id of an object that stays here, or raises Unsendable."""
    if value is None or value is True or value is False:
        return value
    if depth > MAX_DEPTH:
        raise Unsendable("nested more than %d deep" % MAX_DEPTH)

    def each(items):
        return [encode(item, reference, depth + 1) for item in items]

    if isinstance(value, int):
        number = int.__int__(value)
        return number if -(1 << 53) < number < 1 << 53 else {"int": hex(number)}
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return each(list.__iter__(value))
    if isinstance(value, tuple):
        return {"tuple": each(tuple.__iter__(value))}
    if isinstance(value, dict):
        return {"dict": [each(pair) for pair in dict.items(value)]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    for tag, kind in (("set", set), ("frozenset", frozenset), ("deque", collections.deque)):
        if isinstance(value, kind):
            return {tag: each(kind.__iter__(value))}
    if isinstance(value, (bytes, bytearray)):
        return {"bytearray" if isinstance(value, bytearray) else "bytes": bytes(value).hex()}
    if type(value) in _BY_TEXT:
        return {type(value).__name__: str(value)}
    if type(value) is range:
        return {"range": [encode(n, reference) for n in (value.start, value.stop, value.step)]}
    if type(value) in _VIEWS:
        return {_VIEWS[type(value)]: each(value)}
    if isinstance(value, _ITERATORS):
        items = list(itertools.islice(value, MAX_ITERATED + 1))
        if len(items) > MAX_ITERATED:
            raise Unsendable("an iterator of more than %d items" % MAX_ITERATED)
        return {"iterator": each(items)}
    if isinstance(value, (type, types.BuiltinFunctionType)) and _BUILTINS.get(value.__name__) is value:
        return {"builtin": value.__name__}
    return {"@": reference(value)}


def decode(form, resolve):
    """Inverse of `encode`. resolve(id) gives what a reference stands for. Raises ValueError on anything malformed."""
    if isinstance(form, list):
        return [decode(item, resolve) for item in form]
    if not isinstance(form, dict):
        return form
    if len(form) != 1:
        raise ValueError("not a value: %d keys" % len(form))
    ((tag, content),) = form.items()
    if tag == "@":
        return resolve(content)
    if tag not in _DECODERS:
        raise ValueError("unknown tag")
    try:
        if tag in ("int", "bytes", "bytearray", "Fraction", "Decimal", "builtin"):
            return _DECODERS[tag](content)
        return _DECODERS[tag]([decode(item, resolve) for item in content])
    except (TypeError, KeyError, ArithmeticError) as error:
        raise ValueError("malformed %s: %s" % (tag, error)) from error


def _from_hex(content):
    return int(content, 16)


_BUILTINS = dict(vars(__import__("builtins")))
_BY_TEXT = (fractions.Fraction, decimal.Decimal)
_VIEWS = {type({}.keys()): "keys", type({}.values()): "values", type({}.items()): "items"}
_ITERATORS = tuple(
    {type(iter(x)) for x in ([], (), {}, {}.values(), {}.items(), set(), "", "é", b"", range(0), collections.deque())}
    | {types.GeneratorType, map, filter, zip, enumerate, reversed, type(reversed([]))}
    | {kind for kind in vars(itertools).values() if isinstance(kind, type)}
)
_DECODERS = {
    "int": _from_hex,
    "tuple": tuple,
    "dict": dict,
    "complex": lambda parts: complex(*parts),
    "set": set,
    "frozenset": frozenset,
    "deque": collections.deque,
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "Fraction": fractions.Fraction,
    "Decimal": decimal.Decimal,
    "range": lambda ends: range(*ends),
    "keys": lambda items: dict.fromkeys(items).keys(),
    "values": lambda items: dict(enumerate(items)).values(),
    "items": lambda pairs: dict(pairs).items(),
    "iterator": iter,
    "builtin": lambda name: _BUILTINS[name],
}
