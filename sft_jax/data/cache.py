"""Arrays kept on disk under the hash of what they were made from: a find is right, or it is no find.

An entry is a directory named by its key, with a file for each array and an index of them with their checksums. It is
written beside its place and renamed, so that a process that is killed leaves a whole entry or none; one that has
changed on disk is no find, and is written anew. Processes that want the same entry wait for the one that makes it. The
least recently used entries make way for new ones. A cache that cannot be written changes nothing but the time. Holds
plain arrays only: nothing that is read here can run code.

Arrays are written block by block and read where they lie: large ones are mapped from their files, so that neither
making nor having them takes memory of their size. What is kept nowhere goes the same way once it is large, through
files without a name in the directory for temporary ones. All that is given back is read-only.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from sft_jax.errors import DataError, reason

MOST_BYTES = 20_000_000_000
INDEX = "index"
ABANDONED = 24 * 3600  # seconds after which what is half-written belongs to no one
IN_MEMORY = 1 << 26  # bytes of what is kept nowhere, above which it goes to files
MAPPED = 1 << 20  # bytes of an array, from which on it is mapped and no copy
CHUNK = 1 << 23  # bytes that are read, or filled in, at one time
PLAIN = "biufcSUV"  # kinds of types that hold nothing but bytes

Arrays = dict[str, np.ndarray]


class _Unwritable(DataError):
    """What lies on disk cannot be written there."""


def key(parts: Iterable[str | bytes]) -> str:
    """The hash of these parts, each of them told apart from the next."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


class Sink:
    """Arrays that grow by blocks, in memory as long as they are small, then in files.

    An array of one dimension of which all entries are equal takes no room at all.
    """

    def __init__(self, opened: Callable[[int], IO[bytes]], in_memory: int):
        self._opened, self._most, self._left = opened, in_memory, in_memory
        self._arrays: dict[str, _Growing] = {}
        self._files: list[IO[bytes]] = []
        self._close = weakref.finalize(self, _close, self._files)  # also where reading ends in an error

    def add(self, name: str, block: np.ndarray) -> None:
        """Append to an array; all of its blocks are of one type, and of one shape but for the first axis."""
        block = np.ascontiguousarray(block)
        array = self._arrays.setdefault(name, _Growing(block.dtype, block.shape[1:]))
        array.add(block)
        self._left -= block.nbytes if array.alike is None else 0
        if self._left < 0:
            self._spill()

    def finish(self, *, in_files: bool = False) -> tuple[Arrays, dict[str, Any]]:
        """(the arrays, what an index says of them); all in files, or those only that are there by now."""
        if in_files:
            self._spill()
        with _writing():
            found = {name: array.finish() for name, array in self._arrays.items()}
        self._close()
        return {name: array for name, (array, _) in found.items()}, {name: said for name, (_, said) in found.items()}

    def _spill(self) -> None:
        with _writing():
            for number, array in enumerate(self._arrays.values()):
                if array.alike is None:
                    if array.file is None:
                        array.number, array.file = number, self._opened(number)
                        self._files.append(array.file)
                    array.spill()
        self._left = self._most


@dataclass
class _Growing:
    """An array that grows: its blocks that are in memory, and its file where there are others."""

    dtype: np.dtype
    shape: tuple[int, ...]  # of an entry
    count: int = 0
    alike: np.ndarray | None = None  # [1]; what all entries so far are
    number: int = 0  # of the file
    file: IO[bytes] | None = None

    def __post_init__(self):
        self.blocks: list[np.ndarray] = []
        self.digest = xxhash.xxh3_128()
        self.mixed = bool(self.shape) or self.dtype.kind not in "biuf" or self.dtype.itemsize > 8

    def add(self, block: np.ndarray) -> None:
        if not self.mixed and len(block):
            first = self.alike if self.alike is not None else block[:1].copy()
            bits = f"u{block.itemsize}"  # which NaN is equal in, and -0 is not
            if (block.view(bits) == first.view(bits)).all():
                self.alike, self.count = first, self.count + len(block)
                return
            self._no_more_alike()
        self.count += len(block)
        self.blocks.append(block)

    def spill(self) -> None:
        """Write what is in memory."""
        assert self.file
        for block in self.blocks:
            for part in chunks(block):
                content = part.tobytes()
                self.digest.update(content)
                self.file.write(content)
        self.blocks.clear()

    def finish(self) -> tuple[np.ndarray, dict[str, Any]]:
        shape = (self.count, *self.shape)
        said: dict[str, Any] = {"dtype": self.dtype.str, "shape": shape}
        if self.alike is not None:
            return np.broadcast_to(self.alike, shape), {**said, "alike": self.alike.tobytes().hex()}
        if self.file is None:
            array = np.concatenate([np.zeros((0, *self.shape), self.dtype), *self.blocks])
            array.flags.writeable = False
            return array, said
        self.spill()
        self.file.flush()
        said |= {"file": str(self.number), "xxh3_128": self.digest.hexdigest()}
        return _mapped(self.file, self.dtype, shape), said

    def _no_more_alike(self) -> None:
        self.mixed = True
        if self.alike is not None:
            step = max(1, CHUNK // self.dtype.itemsize)
            self.blocks += [np.repeat(self.alike, min(step, self.count - n)) for n in range(0, self.count, step)]
            self.alike = None


def scratch() -> Sink:
    """A sink for what is gone with the process; what is large lies in files that have no name."""
    return Sink(lambda number: tempfile.TemporaryFile(), IN_MEMORY)


def made(
    home: Path | None,
    parts: Callable[[], Iterable[str | bytes]],
    make: Callable[[Sink], None],
    most_bytes: int = MOST_BYTES,
) -> Arrays:
    """The arrays that `make` puts into a sink; those of the entry at `home` where it is there, else it is there then.

    `parts` are all that they depend on. `make` may be called again, where the cache turns out not to be writable.
    """
    if home is None:
        return _kept_nowhere(make)
    name = key(parts())
    found = load(home, name)
    if found is None:
        with _alone(home, name):
            found = load(home, name)  # what was made by another process in the meantime
            if found is None:
                try:
                    found = _kept(home, name, make, most_bytes)
                except _Unwritable:
                    found = _kept_nowhere(make)
    return found


def load(home: Path, name: str) -> Arrays | None:
    """The arrays of an entry, or None where there is none that is whole."""
    entry = home / name
    try:
        checksum, _, index = (entry / INDEX).read_bytes().partition(b"\n")
        if checksum.decode("ascii") != xxhash.xxh3_128_hexdigest(index):
            return None
        found = {name: _read(entry, said) for name, said in json.loads(index).items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    with contextlib.suppress(OSError):  # of someone else's that may only be read
        os.utime(entry)  # the least recently used goes first
    return found


def store(home: Path, name: str, arrays: Mapping[str, np.ndarray], most_bytes: int = MOST_BYTES) -> None:
    """Keep arrays under a name, in place of what is there; where that is not to be had, nothing is kept."""

    def add_all(sink: Sink) -> None:
        for array, values in arrays.items():
            sink.add(array, values)

    with contextlib.suppress(_Unwritable):
        _kept(home, name, add_all, most_bytes)


def chunks(array: np.ndarray, bytes_each: int = CHUNK) -> Iterator[np.ndarray]:
    """An array in parts along its first axis, so that what is done with it takes the memory of a part."""
    step = max(1, bytes_each // max(1, array.dtype.itemsize * int(np.prod(array.shape[1:]))))
    for begin in range(0, len(array), step):
        yield array[begin : begin + step]


def _kept(home: Path, name: str, make: Callable[[Sink], None], most_bytes: int) -> Arrays:
    """Make an entry, in place of what is there."""
    with contextlib.ExitStack() as stack:
        with _writing():
            home.mkdir(parents=True, exist_ok=True, mode=0o700)
            fresh = stack.enter_context(_work(home)) / name
            fresh.mkdir(mode=0o700)
        sink = Sink(lambda number: open(fresh / str(number), "w+b"), CHUNK)  # noqa: SIM115
        make(sink)
        arrays, index = sink.finish(in_files=True)
        with _writing():
            said = json.dumps(index).encode()
            (fresh / INDEX).write_bytes(xxhash.xxh3_128_hexdigest(said).encode() + b"\n" + said)
            _remove(home / name)  # damaged, or just now written by another process
            fresh.rename(home / name)
    with contextlib.suppress(OSError):
        _make_room(home, most_bytes)
    return arrays


def _kept_nowhere(make: Callable[[Sink], None]) -> Arrays:
    """Make arrays that are gone with the process."""
    sink = scratch()
    make(sink)
    return sink.finish()[0]


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _Unwritable(
            f"{tempfile.gettempdir()}: what does not fit into memory cannot be written there ({reason(error)}); make "
            f"room, or name another directory by TMPDIR"
        ) from None


def _close(files: Iterable[IO[bytes]]) -> None:
    for file in files:
        with contextlib.suppress(OSError):
            file.close()


def _read(entry: Path, said: Mapping[str, Any]) -> np.ndarray:
    """An array as an index says it is; raises ValueError where it is another by now."""
    dtype, shape = np.dtype(said["dtype"]), tuple(said["shape"])
    if dtype.kind not in PLAIN:
        raise ValueError(dtype)
    if "alike" in said:
        return np.broadcast_to(np.frombuffer(bytes.fromhex(said["alike"]), dtype), shape)
    digest, size = xxhash.xxh3_128(), 0
    with open(entry / said["file"], "rb", buffering=0) as file:
        buffer = memoryview(bytearray(CHUNK))  # read, since pages that are mapped would count as ours
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
        if digest.hexdigest() != said["xxh3_128"] or size != dtype.itemsize * int(np.prod(shape)):
            raise ValueError(said["file"])
        return _mapped(file, dtype, shape)


def _mapped(file: IO[bytes], dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The array in a file: where it lies if it is large, else a copy."""
    size = dtype.itemsize * int(np.prod(shape))
    if size < MAPPED:
        file.seek(0)
        return np.frombuffer(file.read(size), dtype).reshape(shape)
    return np.memmap(file, dtype, "r", shape=shape).view(np.ndarray)


@contextlib.contextmanager
def _alone(home: Path, name: str) -> Iterator[None]:
    """Be the only process that makes an entry; not where locks are not to be had, which costs time alone.

    The lock is the system's, so that a process that is killed leaves none.
    """
    lock, place = None, home / f".{name}.lock"
    with contextlib.suppress(OSError):
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        while lock is None:
            lock = os.open(place, os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (place.exists() and os.path.samestat(os.stat(place), os.fstat(lock))):  # taken away by its last one
                os.close(lock)
                lock = None
    try:
        yield
    finally:
        if lock is not None:
            with contextlib.suppress(OSError):
                place.unlink()
            os.close(lock)


@contextlib.contextmanager
def _work(home: Path) -> Iterator[Path]:
    """A directory beside the entries that nobody takes for one, for as long as it is needed."""
    with tempfile.TemporaryDirectory(dir=home, prefix=".", ignore_cleanup_errors=True) as work:
        yield Path(work)


def _remove(entry: Path) -> None:
    """Take an entry away, at once for whoever looks for it."""
    with contextlib.suppress(FileNotFoundError), _work(entry.parent) as work:
        entry.rename(work / entry.name)


def _make_room(home: Path, most_bytes: int) -> None:
    """Remove the entries that were longest not used, until the rest is small enough, and what was left half-written."""
    found = [(entry.stat().st_mtime, entry) for entry in home.iterdir()]
    for changed, entry in found:
        if entry.name.startswith(".") and changed < time.time() - ABANDONED:
            shutil.rmtree(entry, ignore_errors=True)
            if not entry.is_dir():
                entry.unlink(missing_ok=True)
    entries = sorted((changed, entry) for changed, entry in found if not entry.name.startswith("."))
    sizes = {entry: sum(file.stat().st_size for file in entry.iterdir()) for _, entry in entries}
    left = sum(sizes.values())
    for _, entry in entries:
        if left <= most_bytes:
            return
        _remove(entry)
        left -= sizes[entry]
