"""The header of a GGUF file: what it says of a model and its tokenizer, and where its tensors lie.

The file is untrusted: every count is held against the bytes that are there, and against a bound, before anything is
made of it; only the header is read here. Knows no architecture. The form is that of llama.cpp's `docs/gguf.md`.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sft_jax.errors import ModelError

ENDING = ".gguf"
MAGIC, VERSIONS = b"GGUF", (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
FLOAT, STRING, ARRAY = 6, 8, 9
ALIGNMENT = "general.alignment"
MOST_BYTES = 1 << 27  # of a header
MOST_KEYS, MOST_TENSORS, MOST_DIMENSIONS = 1 << 12, 1 << 16, 4
MOST_TEXTS = 1 << 21  # in lists, all together: vocabulary and merges
LONGEST_NAME = 1 << 16  # bytes, as the format has it


class Tensor(NamedTuple):
    """Where the numbers of a tensor lie, and in which form."""

    kind: str  # as ggml calls it: "F32", "Q4_1"
    shape: tuple[int, ...]  # outermost first, as numpy has it
    begin: int  # byte in the file
    size: int  # bytes


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its numbers begin. Lists of texts are lists, those of numbers are arrays."""

    file: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def is_gguf(place: Path) -> bool:
    """Whether this is a GGUF file, by its name."""
    return place.suffix == ENDING and place.is_file()


def read_header(file: Path) -> Header:
    """The header of a file; raises ModelError where it is no whole GGUF file, or larger than any honest one."""
    try:
        with open(file, "rb") as source:
            return _read(file, _Cursor(source, file.stat().st_size))
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror}); check the path and the file") from None
    except _Broken as error:
        raise ModelError(f"{file}: not a whole GGUF file ({error}); fetch it again") from None


class _Broken(Exception):
    """The bytes are not what the format says."""


class _Cursor:
    """Reads on from where it is, and never past the end of the file or the bound of a header."""

    def __init__(self, source: BinaryIO, size: int):
        self.source, self.size = source, size
        self.position = self.texts = 0

    def bytes(self, count: int) -> bytes:
        """The next bytes."""
        if count > self.size - self.position:
            raise _Broken(f"it ends at byte {self.size}, {count} were to follow byte {self.position}")
        if self.position + count > MOST_BYTES:
            raise _Broken(f"its header has more than {MOST_BYTES} bytes")
        self.position += count
        found = self.source.read(count)
        if len(found) < count:
            raise _Broken("it became shorter while it was read")
        return found

    def number(self, form: str) -> Any:
        """The next number, of a form of `struct`."""
        return struct.unpack(f"<{form}", self.bytes(struct.calcsize(f"<{form}")))[0]

    def text(self, most: int = MOST_BYTES) -> str:
        """The next text, which has its length before it."""
        count = self.number("Q")
        if count > most:
            raise _Broken(f"a text of {count} bytes at byte {self.position}")
        try:
            return self.bytes(count).decode("utf-8")
        except UnicodeDecodeError:
            raise _Broken(f"a text before byte {self.position} is not UTF-8") from None

    def count(self, what: str, most: int) -> int:
        """The next count of things."""
        found = self.number("Q")
        if found > most:
            raise _Broken(f"{found} {what}, more than {most}")
        return found


def _read(file: Path, cursor: _Cursor) -> Header:
    if cursor.bytes(4) != MAGIC:
        raise _Broken("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in VERSIONS:
        raise _Broken(f"version {version}, expected one of {', '.join(map(str, VERSIONS))}")
    tensors = cursor.count("tensors", MOST_TENSORS)
    keys = cursor.count("keys", MOST_KEYS)
    metadata = _named(keys, "key", cursor, lambda: _value(cursor, cursor.number("I")))
    placed = _named(tensors, "tensor", cursor, lambda: _tensor(cursor))
    unit = metadata.get(ALIGNMENT, 32)
    if type(unit) is not int or unit < 1 or unit & (unit - 1):
        raise _Broken(f"{ALIGNMENT} is no power of two")
    begin = -(-cursor.position // unit) * unit
    found = {name: tensor._replace(begin=begin + tensor.begin) for name, tensor in placed.items()}
    for name, tensor in found.items():
        if tensor.begin + tensor.size > cursor.size:
            raise _Broken(f"tensor {name!r:.80} ends at byte {tensor.begin + tensor.size}, the file at {cursor.size}")
    return Header(file, metadata, found)


def _named(count: int, what: str, cursor: _Cursor, read: Callable[[], Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(count):
        name = cursor.text(LONGEST_NAME)
        if name in found:
            raise _Broken(f"{what} {name!r:.80} is there twice")
        found[name] = read()
    return found


def _value(cursor: _Cursor, kind: int) -> Any:
    if kind == STRING:
        return cursor.text()
    if kind == ARRAY:
        return _list(cursor)
    if kind not in SCALARS:
        raise _Broken(f"a value of type {kind} at byte {cursor.position}")
    found = cursor.number(SCALARS[kind])
    # The shortest number that is this float: 1e-05, not 9.999999747378752e-06.
    return _shortest(found) if kind == FLOAT else found


def _list(cursor: _Cursor) -> Any:
    kind = cursor.number("I")
    if kind == STRING:
        count = cursor.count("texts in a list", MOST_TEXTS - cursor.texts)
        cursor.texts += count
        return [cursor.text() for _ in range(count)]
    if kind not in SCALARS:
        raise _Broken(f"a list of values of type {kind} at byte {cursor.position}")
    import numpy as np  # not before: the commands on configurations only ask whether a file is one

    form = np.dtype(f"<{SCALARS[kind]}")
    return np.frombuffer(cursor.bytes(cursor.number("Q") * form.itemsize), form)


def _tensor(cursor: _Cursor) -> Tensor:
    """A tensor whose `begin` is counted from where the numbers begin."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    dimensions = cursor.number("I")
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise _Broken(f"a tensor of {dimensions} dimensions before byte {cursor.position}")
    shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
    if not all(shape):
        raise _Broken(f"a tensor without numbers before byte {cursor.position}")
    number, begin = cursor.number("I"), cursor.number("Q")
    kinds = {kind.value: kind for kind in GGML_QUANT_SIZES}
    if number not in kinds:
        raise _Broken(f"a tensor of type {number} before byte {cursor.position}")
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(number)]
    if shape[-1] % block:
        raise _Broken(f"a tensor with rows of {shape[-1]} numbers in blocks of {block}")
    return Tensor(kinds[number].name, shape, begin, math.prod(shape) // block * size)


def _shortest(number: float) -> float:
    """The number with the fewest digits that is this one in float32."""
    tried = (float(f"{number:.{digits}g}") for digits in range(1, 10))
    return next((short for short in tried if _float32(short) == number), number)  # NaN is not itself


def _float32(number: float) -> float:
    return struct.unpack("<f", struct.pack("<f", number))[0]
