"""Read the plain data in a pickle without unpickling it.

A pickle is a program for a small stack machine, and the trouble is what its programs may call. Here the machine is
our own: it knows the instructions that build numbers, strings, lists, dicts and plain numeric arrays. It imports
nothing, calls nothing that the file names, and refuses every other instruction.
"""

from __future__ import annotations

import math
import pickletools
import re
from typing import Any

import numpy as np

MAX_STEPS = 2_000_000
"""CIFAR-100's training file takes some 400,000; two million take three seconds."""

MAX_DIMENSIONS = 8

_VALUES = frozenset({
    "BININT", "BININT1", "BININT2", "INT", "LONG1", "LONG", "BINFLOAT", "FLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES",
})  # fmt: skip
_STEPS = frozenset({
    "MARK", "POP", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_TUPLE", "LIST", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "DICT",
    "APPEND", "APPENDS", "SETITEM", "SETITEMS", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET",
    "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD",
})  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_ALLOWED_NAMES = {
    **{f"{module}.multiarray _reconstruct": "reconstruct" for module in ("numpy.core", "numpy._core")},
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    "_codecs encode": "encode",  # how Python 3 writes bytes in protocols 0 to 2, and
    "__builtin__ bytes": "bytes",  # where there are none
}
_DTYPE = re.compile(r"[<>|=]?([uif])([1248])")


class _Name:
    """One of the few things a pickle may name. It stands for itself and can do nothing."""

    def __init__(self, what: str) -> None:
        self.what = what


class _Dtype:
    """A numeric dtype under construction."""

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "|"


class _Array:
    """An array under construction; ``value`` is there once its state came."""

    value: np.ndarray[Any, Any] | None = None


def read_plain(data: bytes) -> Any:
    """Return what the pickle ``data`` holds: numbers, str, bytes, tuples, lists, dicts and numeric arrays.

    Strings of Python 2 become ``str``, each byte one character (latin-1).

    Raises
    ------
    ValueError
        If it is no pickle, is truncated, takes more than :data:`MAX_STEPS`, or contains anything else.
    """
    try:
        return _finished(_Machine(2 * len(data)).run(data))
    except ValueError:
        raise
    except Exception as error:  # what hostile bytes do to pickletools: KeyError, IndexError, UnicodeError, ...
        raise ValueError(f"it is damaged ({type(error).__name__})") from None


class _Machine:
    """The stack, the marks and the memo, and how many bytes may be copied: a few steps can name one string often."""

    def __init__(self, copies: int) -> None:
        self.copies = copies
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if step >= MAX_STEPS:
                raise ValueError(f"it takes more than {MAX_STEPS:,} steps to read")
            name = opcode.name
            if name in _VALUES:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name == "STOP":
                return self.stack.pop()
            elif name in _STEPS:
                getattr(self, f"_{name.lower()}")(argument)
            elif name not in ("PROTO", "FRAME"):
                raise ValueError(f"it uses the instruction {name}, which plain data does not need")
        raise ValueError("it ends without STOP")

    def _items(self) -> list[Any]:
        """Pop everything above the last mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _mark(self, _: None) -> None:
        self.marks.append(len(self.stack))

    def _pop(self, _: None) -> None:
        self.stack.pop()

    def _empty_list(self, _: None) -> None:
        self.stack.append([])

    def _empty_dict(self, _: None) -> None:
        self.stack.append({})

    def _empty_tuple(self, _: None) -> None:
        self.stack.append(())

    def _list(self, _: None) -> None:
        self.stack.append(self._items())

    def _tuple(self, _: None) -> None:
        self.stack.append(tuple(self._items()))

    def _tuple1(self, _: None) -> None:
        self.stack[-1:] = [tuple(self.stack[-1:])]

    def _tuple2(self, _: None) -> None:
        self.stack[-2:] = [tuple(self.stack[-2:])]

    def _tuple3(self, _: None) -> None:
        self.stack[-3:] = [tuple(self.stack[-3:])]

    def _dict(self, _: None) -> None:
        items = self._items()
        self.stack.append({})
        self._set(items)

    def _append(self, _: None) -> None:
        item = self.stack.pop()
        self._extend([item])

    def _appends(self, _: None) -> None:
        self._extend(self._items())

    def _setitem(self, _: None) -> None:
        items = self.stack[-2:]
        del self.stack[-2:]
        self._set(items)

    def _setitems(self, _: None) -> None:
        self._set(self._items())

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise ValueError(f"it appends to a {type(target).__name__}")
        target += items

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        for key in items[::2]:
            if not isinstance(key, str | bytes):  # their hashes are salted; numbers can be made to collide
                raise ValueError(f"it has a dict with a {type(key).__name__} as key")
        if type(target) is not dict or len(items) % 2:
            raise ValueError("it fills something that is no dict")
        target.update(zip(items[::2], items[1::2], strict=True))

    def _binput(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def _memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _binget(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def _put(self, index: int) -> None:
        self._binput(index)

    def _get(self, index: int) -> None:
        self._binget(index)

    _long_binput, _long_binget = _binput, _binget

    def _global(self, names: str) -> None:
        if names not in _ALLOWED_NAMES:
            raise ValueError(f"it names {names.replace(' ', '.')[:80]!r}, which plain data does not need")
        self.stack.append(_Name(_ALLOWED_NAMES[names]))

    def _stack_global(self, _: None) -> None:
        module, name = self.stack[-2:]
        del self.stack[-2:]
        self._global(f"{module} {name}")

    def _reduce(self, _: None) -> None:
        called, arguments = self.stack[-2:]
        del self.stack[-2:]
        what = called.what if isinstance(called, _Name) else type(called).__name__
        made = self._made(what, arguments if isinstance(arguments, tuple) else ())
        if made is None:
            raise ValueError(f"it calls {what} in a way that plain data does not need")
        self.stack.append(made)

    def _made(self, what: str, arguments: tuple[Any, ...]) -> Any:
        """Return what a call of one of the allowed names gives, or ``None`` if it is not how numpy calls it."""
        if what == "reconstruct" and len(arguments) == 3:
            kind = arguments[0]
            return _Array() if isinstance(kind, _Name) and kind.what == "ndarray" else None
        if what == "dtype" and arguments and isinstance(arguments[0], str) and _DTYPE.fullmatch(arguments[0]):
            return _Dtype(arguments[0])
        if what == "encode" and len(arguments) == 2 and isinstance(arguments[0], str) and arguments[1] == "latin1":
            return self._encoded(arguments[0])
        return b"" if what == "bytes" and not arguments else None

    def _build(self, _: None) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, _Dtype) and isinstance(state, tuple) and len(state) >= 2 and state[1] in ("<", ">", "|"):
            target.order = state[1]
        elif isinstance(target, _Array) and target.value is None:
            target.value = self._array(state)
        else:
            raise ValueError(f"it sets the state of a {type(target).__name__}")

    def _encoded(self, text: str) -> bytes:
        self.copies -= len(text)
        if self.copies < 0:
            raise ValueError("it repeats its data")
        return text.encode("latin1")

    def _array(self, state: Any) -> np.ndarray[Any, Any]:
        """Return the array with numpy's pickled state (version, shape, dtype, Fortran order, bytes)."""
        if not isinstance(state, tuple) or len(state) != 5:
            raise ValueError("it has an array without a shape or data")
        _, shape, kind, fortran, content = state
        content = self._encoded(content) if isinstance(content, str) else content
        sizes = shape if isinstance(shape, tuple) and len(shape) <= MAX_DIMENSIONS else (None,)
        if not all(type(size) is int and 0 <= size < 1 << 40 for size in sizes):
            raise ValueError("it has an array of impossible shape")
        if not isinstance(kind, _Dtype) or not isinstance(content, bytes):
            raise ValueError("it has an array of something other than numbers")
        dtype = np.dtype(kind.order + kind.code.lstrip("=<>|"))
        if math.prod(sizes) * dtype.itemsize != len(content):
            raise ValueError(f"it has an array of shape {list(sizes)} with {len(content)} bytes of data")
        return np.frombuffer(content, dtype).reshape(sizes, order="F" if fortran else "C")


def _finished(value: Any) -> Any:
    """Return ``value`` with its arrays, looking no deeper than a dict's or list's own items."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, _Array):
        if value.value is None:
            raise ValueError("it has an array without data")
        return value.value
    if isinstance(value, _Name | _Dtype):
        raise ValueError("it holds something that is no data")
    return value
