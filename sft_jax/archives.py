"""Members of zip and tar archives and Debian packages, read in memory one at a time; nothing is extracted to a disk.

Archives are untrusted: names stay relative and plain, only regular files are read, and number, size and ratio are
bounded before anything is unpacked. Knows nothing of what is inside.
"""

import bz2
import gzip
import io
import lzma
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

from sft_jax.errors import DataError, reason

ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
LIMIT_BYTES = 16 << 30  # of all members together
MOST_MEMBERS = 1_000_000
MEMBER_BYTES = 1 << 30  # of one, which is held in memory
MOST_RATIO, SMALL_BYTES = 100, 64 << 20  # unpacked bytes for each packed one, once there are more than a few
HEADER_BYTES = 1 << 20  # of a tar that belong to no member, in one place
BLOCK, RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE
ZIPS = (b"PK\x03\x04", b"PK\x05\x06")  # the first bytes of a file
DEBIAN, DEBIAN_HEADER = b"!<arch>\n", 60  # of a package, and the bytes before each of its parts
UNPACKERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
BROKEN = (OSError, EOFError, ValueError, RuntimeError, MemoryError, zipfile.BadZipFile, tarfile.TarError, zlib.error,
          lzma.LZMAError)  # fmt: skip


def members(archive: Path, limit_bytes: int = LIMIT_BYTES) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each regular file in a zip or a tar (plain, gzip, bzip2, xz), in the archive's order.

    Of a Debian package these are the files that it would install; links, which many have, are passed over there.
    Raises DataError for a broken archive, one that unpacks to more than `limit_bytes`, or any member that could
    reach outside: absolute names, `..`, links, devices, encrypted or repeated members.
    """
    try:
        tally = _Tally(archive, limit_bytes)
        with open(archive, "rb") as file:
            begin = file.read(8)
            file.seek(0)
            if begin.startswith(ZIPS):
                yield from _of_zip(tally)
            elif begin == DEBIAN:
                yield from _of_tar(tally, io.BytesIO(_installed(file)), links=True)
            else:
                yield from _of_tar(tally, file)
    except BROKEN as error:
        raise DataError(f"{archive}: not a whole zip or tar archive ({reason(error, 100)}); fetch it again") from None


class _Tally:
    """What was met so far, and whether the next member may be read."""

    def __init__(self, archive: Path, limit_bytes: int):
        self.archive, self.limit = archive, limit_bytes
        self.packed = archive.stat().st_size
        self.names: set[str] = set()
        self.total = 0

    def admit(self, name: str, size: int, kind: str) -> str:
        """The plain name of a member; `kind` is `file`, `directory`, or what else it is."""
        where = f"{self.archive}: member {name!r:.80}"
        parts = name.split("/")
        if name.startswith("/") or "\\" in name or "\0" in name or ".." in parts or re.match("[A-Za-z]:", name):
            raise DataError(f"{where} reaches outside the archive; do not trust it")
        if kind not in ("file", "directory"):
            raise DataError(f"{where} is {kind}; pack plain files alone")
        plain = "/".join(part for part in parts if part not in ("", "."))
        if kind == "directory":
            return plain
        if plain in self.names:
            raise DataError(f"{where} is there twice; pack each file once")
        self.names.add(plain)
        self.total += size
        if size > MEMBER_BYTES:
            raise DataError(f"{where} has {size} bytes; a member has at most {MEMBER_BYTES}")
        if len(self.names) > MOST_MEMBERS:
            raise DataError(f"{self.archive}: more than {MOST_MEMBERS} members; pack fewer, larger files")
        self.unpacked(self.total)
        return plain

    def unpacked(self, count: int) -> None:
        """Refuse a count of unpacked bytes that no honest archive of this size holds."""
        if count > self.limit:
            raise DataError(f"{self.archive}: unpacks to more than {self.limit} bytes; split it")
        if count > SMALL_BYTES and count > MOST_RATIO * self.packed:
            raise DataError(
                f"{self.archive}: {self.packed} bytes unpack to more than {MOST_RATIO} times as many; do not trust it"
            )


def _of_zip(tally: _Tally) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(tally.archive) as held:
        admitted = [(tally.admit(i.orig_filename, i.file_size, _zip_kind(i)), i) for i in held.infolist()]
        for name, info in admitted:
            if not info.is_dir():
                with held.open(info) as member:
                    content = member.read(info.file_size + 1)  # without a number, far more could be unpacked
                yield name, content


def _zip_kind(info: zipfile.ZipInfo) -> str:
    mode = stat.S_IFMT(info.external_attr >> 16)
    if info.is_dir():
        return "directory"
    if info.flag_bits & 0x1:
        return "encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # the others unpack without a bound
        return "neither stored nor deflated"
    return "file" if mode in (0, stat.S_IFREG) else "a link" if mode == stat.S_IFLNK else "a device"


class _Stream:
    """The unpacked bytes of a tar, in order, up to where the reader of members has leave to go."""

    def __init__(self, source: Any, tally: _Tally):
        self.source, self.tally = source, tally
        self.position = self.leave = 0
        self.last = b""

    def allow(self, count: int) -> None:
        """Let so many bytes be read from here, and what is needed to come to the next header."""
        self.leave = self.position + count + HEADER_BYTES

    def read(self, count: int) -> bytes:
        """The next bytes."""
        if self.position > self.leave:
            raise DataError(
                f"{self.tally.archive}: more than {HEADER_BYTES} bytes that belong to no member; do not trust it"
            )
        self.last = self.source.read(count)
        self.position += len(self.last)
        self.tally.unpacked(self.position)
        return self.last

    def ends_at(self, offset: int) -> bool:
        """Whether the block at an offset, among the last that were read, is the empty one that ends an archive."""
        begin = offset - self.position + len(self.last)
        return begin >= 0 and self.last[begin : begin + BLOCK] == b"\0" * BLOCK


def _installed(package: IO[bytes]) -> bytes:
    """The tar in a Debian package, packed as it is, that holds what the package installs: deb(5)."""
    package.seek(len(DEBIAN))
    while len(header := package.read(DEBIAN_HEADER)) == DEBIAN_HEADER:
        size = int(header[48:58])
        if size < 0:  # or this would never end
            break
        if header.startswith(b"data.tar"):
            return package.read(size)
        package.seek(size + size % 2, os.SEEK_CUR)
    raise tarfile.ReadError("a Debian package without data")


def _of_tar(tally: _Tally, packed: IO[bytes], *, links: bool = False) -> Iterator[tuple[str, bytes]]:
    """The members of a tar; with `links` it may hold some, which are passed over."""
    begin = packed.read(6)
    packed.seek(0)
    opener: Any = next((o for magic, o in UNPACKERS.items() if begin.startswith(magic)), nullcontext)
    with opener(packed) as source:
        stream = _Stream(source, tally)
        stream.allow(0)
        reader: Any = stream  # all that tarfile asks of a stream is `read`
        with tarfile.open(fileobj=reader, mode="r|", bufsize=RECORD) as tar:
            while (member := tar.next()) is not None:
                vars(tar)["members"].clear()  # or each would be kept
                if links and (member.issym() or member.islnk()):
                    continue
                name = tally.admit(member.name, member.size, _tar_kind(member))
                stream.allow(member.size)
                if member.isfile():
                    content = tar.extractfile(member)
                    assert content is not None
                    yield name, content.read()
                stream.allow(0)
            if not stream.ends_at(tar.offset):  # tarfile takes a broken header for the end
                raise tarfile.ReadError(f"no header at byte {tar.offset}")
            while stream.read(RECORD):  # to the end, where the checksum of the packed bytes stands
                pass


def _tar_kind(member: tarfile.TarInfo) -> str:
    if member.issparse():
        return "a sparse file"
    if member.isfile():
        return "file"
    if member.isdir():
        return "directory"
    return "a link" if member.issym() or member.islnk() else "a device"
