"""Arrays kept on disk under the hash of what they were made from: a find is right, or it is no find.

An entry is a directory named by its key, with the arrays and their checksum. It is written beside its place and
renamed, so that a process that is killed leaves a whole entry or none; one that has changed on disk is no find, and is
written anew. The least recently used entries make way for new ones. A cache that cannot be written changes nothing but
the time. Holds plain arrays only: nothing that is read here can run code.
"""

import contextlib
import hashlib
import io
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

MOST_BYTES = 20_000_000_000
ARRAYS, CHECKSUM = "arrays.npz", "sha256"
ABANDONED = 24 * 3600  # seconds after which what is half-written belongs to no one


def key(parts: Iterable[str | bytes]) -> str:
    """The hash of these parts, each of them told apart from the next."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def load(home: Path, name: str) -> dict[str, np.ndarray] | None:
    """The arrays of an entry, or None where there is none that is whole."""
    try:
        content = (home / name / ARRAYS).read_bytes()
        if (home / name / CHECKSUM).read_text(encoding="ascii") != hashlib.sha256(content).hexdigest():
            return None
        os.utime(home / name)  # the least recently used goes first
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, BadZipFile):
        return None


def store(home: Path, name: str, arrays: Mapping[str, np.ndarray], most_bytes: int = MOST_BYTES) -> None:
    """Keep arrays under a name, in place of what is there; where that is not to be had, nothing is kept."""
    with contextlib.suppress(OSError):
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _work(home) as work:
            fresh = work / name
            fresh.mkdir(mode=0o700)
            with open(fresh / ARRAYS, "wb") as sink:
                np.savez(sink, allow_pickle=False, **dict(arrays))
            checksum = hashlib.sha256((fresh / ARRAYS).read_bytes()).hexdigest()
            (fresh / CHECKSUM).write_text(checksum, encoding="ascii")
            _remove(home / name)  # damaged, or just now written by another process
            fresh.rename(home / name)
        _make_room(home, most_bytes)


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
    found = [(entry.stat().st_mtime, entry) for entry in home.iterdir() if entry.is_dir()]
    for changed, entry in found:
        if entry.name.startswith(".") and changed < time.time() - ABANDONED:
            shutil.rmtree(entry, ignore_errors=True)
    entries = sorted((changed, entry) for changed, entry in found if not entry.name.startswith("."))
    sizes = {entry: sum(file.stat().st_size for file in entry.iterdir()) for _, entry in entries}
    left = sum(sizes.values())
    for _, entry in entries:
        if left <= most_bytes:
            return
        _remove(entry)
        left -= sizes[entry]
