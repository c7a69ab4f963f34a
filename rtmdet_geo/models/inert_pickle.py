"""Reads pickles without executing any of them: a machine of its own, for plain containers and references to tensors.

Python's unpickler imports and calls what a file names. Here the opcodes come from ``pickletools.genops``, which only
parses, and a name in the file (``posix system``, ``mmengine.config ConfigDict``) stays a name: nothing is imported,
nothing that the file names is called. A few names are understood (ordered dictionaries, torch's tensors and storages);
whatever any other name would have made is a :class:`Placeholder` that remembers what the file said and does nothing.

Opcodes: Python's ``pickletools`` documentation. Meaning of torch's names: its ``_utils.py`` and ``serialization.py``.
"""

from __future__ import annotations

import pickletools
import warnings
from dataclasses import dataclass, field
from typing import IO, Any

from rtmdet_geo.errors import WeightsError

_MARK = object()
#: Nesting and length of tuples that may be a key of a dictionary; hashing larger ones could take for ever.
_MAX_KEY_DEPTH = 2
_MAX_KEY_LENGTH = 100


@dataclass(frozen=True, slots=True)
class Name:
    """A module and a name in it, as the file says; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        """Return ``module.name``."""
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class Placeholder:
    """Stands for an object that was not made.

    Attributes:
        what: name of what would have been called.
        arguments: what it would have been called with.
        state: what would have been put into it: attributes, items of a list, items of a mapping.
    """

    what: str
    arguments: tuple[Any, ...] = ()
    state: list[Any] = field(default_factory=list, repr=False)


@dataclass(frozen=True, slots=True)
class StorageReference:
    """Numbers that lie elsewhere in the file.

    Attributes:
        key: names them.
        dtype: of torch, such as "float32"; "" where tensors say it.
        numel: how many.
        offset: first element, where this is a view into the storage of that key.
    """

    key: str
    dtype: str
    numel: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class TensorReference:
    """A tensor that can be made from numbers elsewhere in the file; ``offset``, ``shape``, ``stride`` in elements."""

    storage: StorageReference
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


#: Names of torch's typed storages and what they hold (torch/storage.py).
_STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "",
}
_DICTIONARIES = {Name("collections", "OrderedDict"), Name("builtins", "dict"), Name("__builtin__", "dict")}


def load_inert(stream: IO[bytes], storages: dict[str, StorageReference] | None = None) -> Any:
    """Return what the next pickle of a stream holds, with placeholders for all that is not plain.

    Args:
        stream: read up to the end of the pickle, not further.
        storages: gets every storage that the pickle refers to, by key.

    Returns:
        None, bool, int, float, str, bytes, list, tuple, dict, set, :class:`TensorReference`,
        :class:`StorageReference`, :class:`Name` or :class:`Placeholder`.

    Raises:
        WeightsError: it is no pickle, or one that no program of torch writes.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickletools: escapes in texts that it does not know
            return _Machine({} if storages is None else storages).run(stream)
    except WeightsError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError) as error:
        reason = str(error) or type(error).__name__
        raise WeightsError(f"the pickle is damaged ({' '.join(reason.split())}); fetch the file again") from error


class _Machine:
    """Stack and memory of one pickle."""

    def __init__(self, storages: dict[str, StorageReference]) -> None:
        self.storages = storages
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: IO[bytes]) -> Any:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                return self.stack.pop()
            handler = _HANDLERS.get(opcode.name)
            if handler is None:
                raise WeightsError(f"the pickle uses {opcode.name}, which no checkpoint needs; it is not read")
            handler(self, argument)
        raise WeightsError("the pickle ends too early; fetch the file again")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def top(self) -> Any:
        if self.stack[-1] is _MARK:
            raise ValueError("nothing on the stack")
        return self.stack[-1]

    def pop(self) -> Any:
        value = self.top()
        self.stack.pop()
        return value

    def pop_to_mark(self) -> list[Any]:
        index = len(self.stack) - 1
        while self.stack[index] is not _MARK:
            index -= 1
            if index < 0:
                raise ValueError("no mark on the stack")
        values = self.stack[index + 1 :]
        del self.stack[index:]
        return values

    # ------------------------------------------------------------ containers

    def append(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, Placeholder):
            target.state.append(values)
        else:
            raise ValueError(f"items for a {type(target).__name__}")

    def set_items(self, pairs: list[Any]) -> None:
        if len(pairs) % 2:
            raise ValueError("a key without value")
        target = self.top()
        items = {_as_key(pairs[index]): pairs[index + 1] for index in range(0, len(pairs), 2)}
        if isinstance(target, dict):
            target.update(items)
        elif isinstance(target, Placeholder):
            target.state.append(items)
        else:
            raise ValueError(f"entries for a {type(target).__name__}")

    def add_items(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, set):
            target.update(map(_as_key, values))
        elif isinstance(target, Placeholder):
            target.state.append(values)
        else:
            raise ValueError(f"members for a {type(target).__name__}")

    # ------------------------------------------------------------ objects

    def push_stored(self, key: Any) -> None:
        value = _stored(key)
        if isinstance(value, StorageReference):
            self.storages.setdefault(value.key, value)
        self.push(value)

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        self.push(_made(function, arguments))

    def build(self) -> None:
        """Attributes of an object: kept by placeholders, dropped for everything that is understood."""
        state = self.pop()
        target = self.top()
        if isinstance(target, Placeholder):
            target.state.append(state)

    def stack_name(self) -> None:
        name, module = self.pop(), self.pop()
        self.push(_name(module, name))

    def make_with_class_below_mark(self) -> None:
        function, *arguments = self.pop_to_mark()
        self.push(_made(function, tuple(arguments)))

    def make_with_keywords(self) -> None:
        keywords, arguments, function = self.pop(), self.pop(), self.pop()
        self.push(_made(function, (*arguments, keywords)))


def _name(module: Any, name: Any) -> Name:
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("a name that is no text")
    return Name(module, name)


def _as_key(value: Any) -> Any:
    """Return what can be hashed at once; everything else becomes a placeholder, which is equal to itself only."""
    if _is_plain_key(value, _MAX_KEY_DEPTH):
        return value
    return Placeholder("key", (value,))


def _is_plain_key(value: Any, depth: int) -> bool:
    if isinstance(value, tuple):
        return depth > 0 and len(value) < _MAX_KEY_LENGTH and all(_is_plain_key(item, depth - 1) for item in value)
    return value is None or isinstance(value, bool | int | float | str | bytes | Name | Placeholder)


def _made(function: Any, arguments: Any) -> Any:
    """Return what calling ``function`` would have made, if it is understood, else a placeholder."""
    if not isinstance(arguments, tuple):
        raise ValueError("arguments that are no tuple")
    if isinstance(function, Name):
        if function in _DICTIONARIES:
            return _dictionary(arguments)
        if function.module == "torch._utils" and function.name in _TENSOR_MAKERS:
            return _TENSOR_MAKERS[function.name](arguments)
        if function == Name("torch._tensor", "_rebuild_from_type_v2") and arguments[0] != function:
            return _made(arguments[0], arguments[2])  # a subclass of Tensor: the tensor below it
        if function == Name("torch", "Size"):
            return tuple(arguments[0])
    return Placeholder(str(function) if isinstance(function, Name) else "result of a call", arguments)


def _dictionary(arguments: tuple[Any, ...]) -> Any:
    if not arguments:
        return {}
    (pairs,) = arguments
    pairs = pairs.items() if isinstance(pairs, dict) else pairs
    return {_as_key(key): value for key, value in pairs}


def _tensor(arguments: tuple[Any, ...], dtype: str = "") -> TensorReference:
    """Check the arguments of ``_rebuild_tensor``; sizes are checked against the numbers when those are read."""
    storage, offset, shape, stride = arguments[:4]
    if not isinstance(storage, StorageReference):
        raise ValueError("a tensor without storage")
    numbers = (offset, *shape, *stride)
    if not all(type(number) is int and number >= 0 for number in numbers) or len(shape) != len(stride):
        raise ValueError("a tensor with impossible sizes")
    return TensorReference(storage, dtype or storage.dtype, offset, tuple(shape), tuple(stride))


def _tensor_v3(arguments: tuple[Any, ...]) -> TensorReference:
    """(storage, offset, size, stride, requires_grad, hooks, dtype, ...): bytes, and the tensor says what they are."""
    dtype = arguments[6]
    if not isinstance(dtype, Name) or dtype.module != "torch":
        raise ValueError("a tensor without dtype")
    return _tensor(arguments, dtype.name)


def _parameter(arguments: tuple[Any, ...]) -> Any:
    return arguments[0]


_TENSOR_MAKERS = {
    "_rebuild_tensor": _tensor,
    "_rebuild_tensor_v2": _tensor,
    "_rebuild_tensor_v3": _tensor_v3,
    "_rebuild_parameter": _parameter,
    "_rebuild_parameter_with_state": _parameter,
}


def _stored(key: Any) -> Any:
    """Return what a persistent id names: ("storage", type, key, place, numel[, view])."""
    if not isinstance(key, tuple) or not key or key[0] != "storage":
        return Placeholder("persistent id", (key,))  # such as the source code that very old files carry
    kind, name, numel = key[1], key[2], key[4]
    if not isinstance(kind, Name) or kind.name not in _STORAGE_DTYPES or kind.module not in {"torch", "torch.storage"}:
        raise WeightsError(f"the file holds numbers of type {str(kind)!r}, which this version does not read")
    if not isinstance(name, str) or type(numel) is not int or numel < 0:
        raise ValueError("a storage with impossible sizes")
    view = key[5] if len(key) > 5 else None
    if view is None:
        return StorageReference(name, _STORAGE_DTYPES[kind.name], numel)
    view_key, offset, view_numel = view
    if not isinstance(view_key, str) or not all(type(number) is int and number >= 0 for number in (offset, view_numel)):
        raise ValueError("a view with impossible sizes")
    return StorageReference(name, _STORAGE_DTYPES[kind.name], numel, offset)


def _push_argument(machine: _Machine, argument: Any) -> None:
    machine.push(argument)


_HANDLERS: dict[str, Any] = {
    **dict.fromkeys(
        (
            *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
            *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
            *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        ),
        _push_argument,
    ),
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, argument: None),
    "NONE": lambda machine, argument: machine.push(None),
    "NEWTRUE": lambda machine, argument: machine.push(True),
    "NEWFALSE": lambda machine, argument: machine.push(False),
    "MARK": lambda machine, argument: machine.push(_MARK),
    "POP": lambda machine, argument: machine.stack.pop(),
    "POP_MARK": lambda machine, argument: machine.pop_to_mark(),
    "DUP": lambda machine, argument: machine.push(machine.top()),
    "EMPTY_LIST": lambda machine, argument: machine.push([]),
    "EMPTY_TUPLE": lambda machine, argument: machine.push(()),
    "EMPTY_DICT": lambda machine, argument: machine.push({}),
    "EMPTY_SET": lambda machine, argument: machine.push(set()),
    "LIST": lambda machine, argument: machine.push(machine.pop_to_mark()),
    "TUPLE": lambda machine, argument: machine.push(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, argument: machine.push((machine.pop(),)),
    "TUPLE2": lambda machine, argument: machine.push(tuple([machine.pop(), machine.pop()][::-1])),
    "TUPLE3": lambda machine, argument: machine.push(tuple([machine.pop(), machine.pop(), machine.pop()][::-1])),
    "FROZENSET": lambda machine, argument: machine.push(frozenset(map(_as_key, machine.pop_to_mark()))),
    "DICT": lambda machine, argument: _make_dict(machine),
    "APPEND": lambda machine, argument: machine.append([machine.pop()]),
    "APPENDS": lambda machine, argument: machine.append(machine.pop_to_mark()),
    "SETITEM": lambda machine, argument: machine.set_items([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, argument: machine.set_items(machine.pop_to_mark()),
    "ADDITEMS": lambda machine, argument: machine.add_items(machine.pop_to_mark()),
    "PUT": lambda machine, argument: machine.memo.__setitem__(int(argument), machine.top()),
    "BINPUT": lambda machine, argument: machine.memo.__setitem__(argument, machine.top()),
    "LONG_BINPUT": lambda machine, argument: machine.memo.__setitem__(argument, machine.top()),
    "MEMOIZE": lambda machine, argument: machine.memo.__setitem__(len(machine.memo), machine.top()),
    "GET": lambda machine, argument: machine.push(machine.memo[int(argument)]),
    "BINGET": lambda machine, argument: machine.push(machine.memo[argument]),
    "LONG_BINGET": lambda machine, argument: machine.push(machine.memo[argument]),
    "GLOBAL": lambda machine, argument: machine.push(_name(*argument.split(" ", 1))),
    "STACK_GLOBAL": lambda machine, argument: machine.stack_name(),
    "REDUCE": lambda machine, argument: machine.reduce(),
    "NEWOBJ": lambda machine, argument: machine.reduce(),
    "NEWOBJ_EX": lambda machine, argument: machine.make_with_keywords(),
    "INST": lambda machine, argument: machine.push(_made(_name(*argument.split(" ", 1)), tuple(machine.pop_to_mark()))),
    "OBJ": lambda machine, argument: machine.make_with_class_below_mark(),
    "BUILD": lambda machine, argument: machine.build(),
    "PERSID": lambda machine, argument: machine.push_stored(argument),
    "BINPERSID": lambda machine, argument: machine.push_stored(machine.pop()),
}


def _make_dict(machine: _Machine) -> None:
    pairs = machine.pop_to_mark()
    machine.push({})
    machine.set_items(pairs)
