"""Tensors out of the files that `torch.save` writes, without torch, and without running anything that a file names.

A pickle is a program. Here it is read by a machine that knows the few instructions such files need, makes plain data
and records of tensors, and can call nothing: a name in the pickle is never looked up, and one that is not among
`KNOWN` ends the reading. Both forms are read: the zip of torch >= 1.6, and the one before (magic number, pickle,
storages). Reference: `torch/serialization.py` and Python's `pickletools`. Holds numpy only.

`main` is the whole of a process of its own, which `convert.py` starts.
"""

import contextlib
import io
import json
import math
import os
import pickletools
import resource
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shortened  # of bounded length, however a pickle nests its data
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from sft_jax.errors import ModelError, listing, reason
from sft_jax.weights.files import check_shards, write_tensors

Arrays = dict[str, np.ndarray]
STORAGES = {
    "torch.FloatStorage": np.float32,
    "torch.DoubleStorage": np.float64,
    "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": ml_dtypes.bfloat16,
    "torch.LongStorage": np.int64,
    "torch.IntStorage": np.int32,
    "torch.ShortStorage": np.int16,
    "torch.CharStorage": np.int8,
    "torch.ByteStorage": np.uint8,
    "torch.BoolStorage": np.bool_,
}
TENSORS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
PARAMETER, ORDERED, SIZE = "torch._utils._rebuild_parameter", "collections.OrderedDict", "torch.Size"
KNOWN = (*TENSORS, PARAMETER, ORDERED, SIZE, *STORAGES)
WRAPPERS = ("state_dict", "model_state_dict", "model")  # under which training scripts keep the weights
ZIP, MAGIC, PROTOCOL = b"PK\x03\x04", 0x1950A86A20F9469CFC6C, 1001
MOST_DIMS, MOST_WRAPPERS, MOST_SHOWN = 32, 3, 20
# Expanded and shared tensors take more room written out than in the file: so many times as much, and a bit.
MOST_GROWTH, SPARE_BYTES = 8, 16 << 20
# Of the process that reads, beside what grows with the files.
MEMORY, SECONDS, BYTES_A_SECOND = 4 << 30, 60, 10_000_000
BROKEN = (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, MemoryError,
          OverflowError, struct.error, zipfile.BadZipFile)  # fmt: skip


@dataclass(frozen=True)
class Pickled:
    """What a file holds: tensors by name, and in words what else there was."""

    tensors: Arrays
    notes: list[str]


@dataclass(frozen=True)
class _Name:
    """A global of a pickle, as text."""

    text: str


@dataclass(frozen=True)
class _Storage:
    """Numbers one after the other, as the pickle declares them."""

    key: str
    kind: str  # one of `STORAGES`
    count: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.count * np.dtype(STORAGES[self.kind]).itemsize


@dataclass(frozen=True)
class _Tensor:
    """A view of a storage, as the pickle declares it; nothing of it is believed yet."""

    storage: _Storage
    offset: Any
    shape: Any
    strides: Any


class _Mark:
    """Where a list of items begins on the stack of a pickle."""


Read = Callable[[_Storage], bytes]


def read_pickle(file: Path) -> Pickled:
    """The tensors of one file that `torch.save` wrote; raises ModelError for whatever else a file may be."""
    try:
        with open(file, "rb") as source:
            zipped = source.read(4) == ZIP
            source.seek(0)
            content, read = _read_zip(file, source) if zipped else _read_legacy(file, source)
            return _tensors(file, content, read)
    except BROKEN as error:
        raise ModelError(f"{file}: not a whole file of torch.save ({reason(error, 100)}); fetch it again") from None


def main() -> None:
    """Do what standard input asks, within bounds on memory and time, and say on standard output what came of it.

    Asked is `{"files": {file: names or null}, "out": directory}`; said is `{"notes": [...]}` or `{"error": "..."}`.
    """
    asked = json.load(sys.stdin)
    size = sum(os.path.getsize(file) for file in asked["files"])
    for limit, most in (
        (resource.RLIMIT_AS, MEMORY + 4 * size),
        (resource.RLIMIT_CPU, SECONDS + size // BYTES_A_SECOND),
    ):
        with contextlib.suppress(ValueError, OSError):  # a lower bound stands already, or the system has none
            resource.setrlimit(limit, (most, most))
    try:
        said = {"notes": _rewrite({Path(f): names for f, names in asked["files"].items()}, Path(asked["out"]))}
    except ModelError as error:
        said = {"error": str(error)}
    json.dump(said, sys.stdout)


def _rewrite(files: Mapping[Path, list[str] | None], out: Path) -> list[str]:
    found = {file: read_pickle(file) for file in files}
    index = {name: file for file, names in files.items() for name in names or found[file].tensors}
    check_shards(next(iter(files)).parent, index, {file: pickled.tensors for file, pickled in found.items()})
    tensors = {name: np.asarray(found[file].tensors[name], order="C") for name, file in index.items()}
    write_tensors(out, tensors)
    return [note for pickled in found.values() for note in pickled.notes]


def _read_zip(file: Path, source: BinaryIO) -> tuple[Any, Read]:
    """What the pickle in a zip describes, and what reads a storage."""
    archive = zipfile.ZipFile(source)
    held = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in held if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1 or len(held) != len(archive.infolist()):
        raise ValueError("a zip without one data.pkl")
    home = pickles[0].removesuffix("data.pkl")
    if f"{home}constants.pkl" in held:
        raise ModelError(f"{file}: a TorchScript program; save model.state_dict() with torch.save instead")
    # torch.save compresses nothing, so that what is read is never more than the file, unless members overlap.
    total = sum(info.file_size for info in held.values())
    if any(info.compress_type != zipfile.ZIP_STORED for info in held.values()) or total > file.stat().st_size:
        raise ValueError("its members are packed, or overlap, as torch.save never writes them")
    _check_order(file, archive.read(f"{home}byteorder") == b"little" if f"{home}byteorder" in held else True)

    def read(storage: _Storage) -> bytes:
        content = archive.read(f"{home}data/{storage.key}")  # the checksum is checked
        if len(content) != storage.size:
            raise ValueError(f"storage {storage.key} has {len(content)} bytes, {storage.size} are declared")
        return content

    return _unpickle(file, io.BytesIO(archive.read(pickles[0])), {}), read


def _read_legacy(file: Path, source: BinaryIO) -> tuple[Any, Read]:
    """What the pickles of an old file describe, and what reads a storage."""
    storages: dict[str, _Storage] = {}
    if _unpickle(file, source, {}) != MAGIC or _unpickle(file, source, {}) != PROTOCOL:
        raise ValueError("no magic number")
    _check_order(file, _unpickle(file, source, {})["little_endian"])
    content = _unpickle(file, source, storages)
    parts: dict[str, bytes] = {}
    for key in _unpickle(file, source, {}):
        storage = storages[key]
        (count,) = struct.unpack("<q", source.read(8))
        if count != storage.count:
            raise ValueError(f"storage {key} has {count} numbers, {storage.count} are declared")
        if storage.size > file.stat().st_size - source.tell():
            raise ValueError(f"storage {key} is cut short")
        parts[key] = source.read(storage.size)
    if source.read(1):
        raise ValueError("bytes follow that belong to no storage")
    return content, lambda storage: parts[storage.key]


def _check_order(file: Path, little: bool) -> None:
    if not little:
        raise ModelError(f"{file}: written on a big-endian machine; save it again on a little-endian one")


def _unpickle(file: Path, source: BinaryIO, storages: dict[str, _Storage]) -> Any:
    """The data, names and tensors that one pickle describes; fills in `storages` by key."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def items() -> list[Any]:
        taken = []
        while (item := stack.pop()) is not _Mark:
            taken.append(item)
        return taken[::-1]

    argument: Any
    for instruction, argument, position in pickletools.genops(source):
        match instruction.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINSTRING" | "SHORT_BINSTRING":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[instruction.name])
            case "MARK":
                stack.append(_Mark)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(instruction.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                stack.append(tuple(items()))
            case "APPEND" | "APPENDS":
                taken = items() if instruction.name == "APPENDS" else [stack.pop()]
                _of_kind(list, stack[-1]).extend(taken)
            case "SETITEM" | "SETITEMS":
                taken = items() if instruction.name == "SETITEMS" else [stack.pop(), stack.pop()][::-1]
                _put(stack[-1], zip(taken[::2], taken[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if argument is None else argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL" | "INST":
                stack.append(_name(file, *argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack[-2:] = [_name(file, *stack[-2:])]
            case "REDUCE":
                stack[-2:] = [_made(*stack[-2:])]
            case "BUILD":
                stack.pop()  # attributes of a dictionary, in which no weights are
            case "BINPERSID":
                storage = _storage(*stack.pop())
                if storages.setdefault(storage.key, storage) != storage:
                    raise ValueError(f"storage {storage.key} is declared in two ways")
                stack.append(storage)
            case other:
                raise ValueError(f"instruction {other} at byte {position}, which torch.save does not use")
    return stack.pop()


def _of_kind(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"a {type(value).__name__} used as a {kind.__name__}")
    return value


def _put(target: Any, pairs: Iterable[Any] = ()) -> Any:
    for key, value in pairs:
        if not isinstance(key, str | int):  # to hash what is nested may take for ever
            raise ValueError(f"a {type(key).__name__} as a key")
        _of_kind(dict, target)[key] = value
    return target


def _name(file: Path, module: Any, name: Any) -> _Name:
    text = f"{_of_kind(str, module)}.{_of_kind(str, name)}"
    if text not in KNOWN:
        raise ModelError(
            f"{file}: names {text!r:.80}, which weights do not need and which could run code (nothing was run); "
            f"do not trust the file, or save model.state_dict() alone"
        )
    return _Name(text)


def _made(called: Any, arguments: tuple[Any, ...]) -> Any:
    """What a call in a pickle stands for; nothing is called."""
    kind = _of_kind(_Name, called).text
    if kind in TENSORS:
        storage, offset, shape, strides = arguments[:4]
        return _Tensor(_of_kind(_Storage, storage), offset, shape, strides)
    if kind == PARAMETER:
        return arguments[0]
    if kind == ORDERED:
        return _put({}, *arguments)
    if kind == SIZE:
        return tuple(arguments[0])
    raise ValueError(f"a call of {kind}")


def _storage(what: Any, kind: Any, key: Any, _place: Any, count: Any, view: Any = None) -> _Storage:
    name = _of_kind(_Name, kind).text
    if what != "storage" or name not in STORAGES or not isinstance(key, str) or not _is_size(count) or view is not None:
        raise ValueError("a storage of an unknown kind")
    return _Storage(key, name, count)


def _tensors(file: Path, content: Any, read: Read) -> Pickled:
    """The tensors of what a pickle describes, each checked against its storage before a number is read."""
    weights, notes = _unwrapped(file, content)
    found = {name: value for name, value in weights.items() if isinstance(value, _Tensor)}
    problems = [
        f"{shortened(name)}: {problem}" for name, tensor in found.items() if (problem := _problem(name, tensor))
    ]
    if problems:
        raise ModelError(listing(str(file), problems[:MOST_SHOWN], max(0, len(problems) - MOST_SHOWN)))
    total = sum(math.prod(t.shape) * np.dtype(STORAGES[t.storage.kind]).itemsize for t in found.values())
    if total > MOST_GROWTH * file.stat().st_size + SPARE_BYTES:
        raise ModelError(f"{file}: {file.stat().st_size} bytes stand for {total} bytes of tensors; do not trust it")
    held = {storage: read(storage) for storage in {tensor.storage for tensor in found.values()}}
    return Pickled({name: _view(held[tensor.storage], tensor) for name, tensor in found.items()}, notes)


def _unwrapped(file: Path, content: Any) -> tuple[dict[Any, Any], list[str]]:
    """The dictionary that holds the tensors, and a note for each thing that is not one of them."""
    notes = []
    inner = content
    for _ in range(MOST_WRAPPERS + 1):
        if not isinstance(inner, dict):
            break
        others = [name for name, value in inner.items() if not isinstance(value, _Tensor)]
        wrapper = next((key for key in WRAPPERS if key in others and isinstance(inner[key], dict)), None)
        wrapped = wrapper is not None and len(others) == len(inner)
        left = [f"left out: {shortened(name)}, which is no tensor" for name in others if not wrapped or name != wrapper]
        notes += left[:MOST_SHOWN] + ([f"left out: {len(left) - MOST_SHOWN} more"] if len(left) > MOST_SHOWN else [])
        if len(others) < len(inner):
            return inner, notes
        if not wrapped:
            break
        notes.append(f"the weights are those under {wrapper!r}")
        inner = inner[wrapper]
    raise ModelError(f"{file}: holds no tensors by name; save model.state_dict() with torch.save")


def _problem(name: Any, tensor: _Tensor) -> str | None:
    """What is wrong with a tensor as it is declared."""
    offset, shape, strides = tensor.offset, tensor.shape, tensor.strides
    if not isinstance(name, str) or not name.isprintable() or name in ("", "__metadata__"):
        return "not a name that a tensor can have"
    if not isinstance(shape, tuple) or not isinstance(strides, tuple) or not len(shape) == len(strides) <= MOST_DIMS:
        return f"shape {shortened(shape)} and strides {shortened(strides)} do not fit"
    if not all(map(_is_size, (offset, *shape, *strides))):
        return f"offset {shortened(offset)}, shape {shortened(shape)}, strides {shortened(strides)} are no sizes"
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    end = offset if 0 in shape else last + 1
    if end > tensor.storage.count:
        return f"reaches to number {end} of a storage that has {tensor.storage.count}"
    return None


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _view(content: bytes, tensor: _Tensor) -> np.ndarray:
    kind = np.dtype(STORAGES[tensor.storage.kind])
    if 0 in tensor.shape:
        return np.empty(tensor.shape, kind)
    strides = tuple(stride * kind.itemsize for stride in tensor.strides)
    return np.ndarray(tensor.shape, kind, content, tensor.offset * kind.itemsize, strides)
