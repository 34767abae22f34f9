"""Archives: honest ones of every kind are read whole; those that would escape, or never end, are refused unread."""

import bz2
import gzip
import io
import lzma
import os
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_jax import archives
from sft_jax.archives import members
from sft_jax.errors import DataError

FILES = {"reviews/good/1.txt": b"a fine film", "reviews/bad/1.txt": b"", "reviews/bad/2.txt": bytes(range(256)) * 50}
PACKERS = {".tar": bytes, ".tar.gz": gzip.compress, ".tar.bz2": bz2.compress, ".tar.xz": lzma.compress}


def tar_of(*entries: tuple[str, bytes], **fields) -> bytes:
    """A tar with these members; `fields` are set on the last one."""
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as tar:
        for number, (name, content) in enumerate(entries, 1):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for field, value in fields.items() if number == len(entries) else ():
                setattr(member, field, value)
            tar.addfile(member, io.BytesIO(content))
    return held.getvalue()


def zip_of(*entries: tuple[str, bytes], change: Callable[[zipfile.ZipInfo], None] = lambda info: None) -> bytes:
    """A zip with these members; `change` is done to the last one before it is written."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, (name, content) in enumerate(entries, 1):
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            if number == len(entries):
                change(info)
            archive.writestr(info, content)
    return held.getvalue()


def deb_of(*parts: tuple[str, bytes]) -> bytes:
    """A Debian package with these parts, which begin at even places."""
    lines = [f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() for name, content in parts]
    padded = (content + b"\n" * (len(content) % 2) for _, content in parts)
    return archives.DEBIAN + b"".join(line + content for line, content in zip(lines, padded, strict=True))


def refusal(file: Path, content: bytes, limit: int = archives.LIMIT_BYTES) -> str:
    """The one line that reading an archive with this content ends with; nothing appears beside it."""
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(members(file, limit))
    message = str(caught.value)
    assert message.startswith(f"{file}: ") and "\n" not in message
    assert os.listdir(file.parent) == [file.name], "something was written"
    return message


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where an archive goes: nothing else is in that directory, and nothing else may come to be there."""
    (tmp_path / "in").mkdir()
    return tmp_path / "in" / "archive"


@pytest.mark.parametrize("ending", [*PACKERS, ".zip"])
def test_honest_archives_are_read(ending, file):
    """R35: files come whole and in order from every kind, folders are passed over, and names are plain."""
    entries = [(f"./{name}" if ending != ".zip" else name, content) for name, content in FILES.items()]
    packed = zip_of(*entries) if ending == ".zip" else PACKERS[ending](tar_of(*entries))
    file.write_bytes(packed)
    assert list(members(file)) == list(FILES.items())


def test_folders_made_by_tar_and_zip(tmp_path):
    """R35: archives that tar and zip make of a directory give its files; long names and sparse-free sizes as well."""
    home = tmp_path / "home"
    long = "/".join(["folder" * 9] * 4)
    for name, content in {**FILES, f"{long}/ünï.txt": b"x"}.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(content)
    wanted = {str(f.relative_to(home)): f.read_bytes() for f in home.rglob("*") if f.is_file()}
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "a.tar.gz", "w:gz", format=form) as tar:
            tar.add(home, arcname=".")
        assert dict(members(tmp_path / "a.tar.gz")) == wanted
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for inside in sorted(home.rglob("*")):
            archive.write(inside, inside.relative_to(home))
    assert dict(members(tmp_path / "a.zip")) == wanted


def test_a_tar_of_zips_is_a_tar(file):
    """R35: what an archive is, its first bytes say, not a zip that is the last member of a tar."""
    inner = zip_of(("a", b"b"))
    file.write_bytes(tar_of(("inner.zip", inner)))
    assert list(members(file)) == [("inner.zip", inner)]


NAMES = ["../evil.txt", "a/../../evil.txt", "/tmp/evil.txt", "..", "C:/evil.txt", "c:evil.txt", "a\\..\\evil.txt"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pack", [tar_of, zip_of])
def test_names_that_escape(pack, name, file):
    """R35: a member whose name leads out of the archive is refused by name, and nothing is written anywhere."""
    message = refusal(file, pack(("fine.txt", b"x"), (name, b"evil")))
    assert "reaches outside the archive; do not trust it" in message and repr(name) in message


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (tarfile.SYMTYPE, "is a link"),
        (tarfile.LNKTYPE, "is a link"),
        (tarfile.CHRTYPE, "is a device"),
        (tarfile.BLKTYPE, "is a device"),
        (tarfile.FIFOTYPE, "is a device"),
    ],
)
def test_tar_members_that_are_no_files(kind, said, file):
    """R35: links, devices and pipes are refused."""
    message = refusal(file, tar_of(("fine.txt", b""), ("odd", b""), type=kind, linkname="/etc/passwd"))
    assert said in message and "'odd'" in message


def test_zip_members_that_are_no_files(file):
    """R35: links, devices, encrypted members and those packed in a way without bounds are refused."""

    def mode(kind: int) -> Callable[[zipfile.ZipInfo], None]:
        return lambda info: setattr(info, "external_attr", (kind | 0o644) << 16)

    fine = ("fine.txt", b"")
    assert "is a link" in refusal(file, zip_of(fine, ("odd", b"/etc/passwd"), change=mode(stat.S_IFLNK)))
    assert "is a device" in refusal(file, zip_of(fine, ("odd", b""), change=mode(stat.S_IFCHR)))
    bz = lambda info: setattr(info, "compress_type", zipfile.ZIP_BZIP2)  # noqa: E731
    assert "neither stored nor deflated" in refusal(file, zip_of(fine, ("odd", b"x" * 99), change=bz))
    locked = bytearray(zip_of(("odd", b"x")))
    locked[6] |= 1  # the flag, in the member's own header and in the directory
    locked[locked.index(b"PK\x01\x02") + 8] |= 1
    assert "is encrypted" in refusal(file, bytes(locked))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("pack", [tar_of, zip_of])
@pytest.mark.parametrize("again", ["a/b.txt", "a//b.txt", "./a/b.txt"])
def test_a_name_twice(pack, again, file):
    """R35: two members of one name are refused, also where it is spelt in two ways."""
    assert "is there twice" in refusal(file, pack(("a/b.txt", b"1"), (again, b"2")))


@pytest.mark.parametrize("pack", [tar_of, zip_of])
def test_limits(pack, file, monkeypatch):
    """R35: the number of members, the size of one and of all together are bounded; what is at the bound is read."""
    content = pack(("a", b"x" * 600), ("b", b"y" * 600))
    assert "unpacks to more than 1199 bytes" in refusal(file, content, 1199)
    monkeypatch.setattr(archives, "MEMBER_BYTES", 599)
    assert "has 600 bytes; a member has at most 599" in refusal(file, content)
    monkeypatch.setattr(archives, "MEMBER_BYTES", 600)
    monkeypatch.setattr(archives, "MOST_MEMBERS", 1)
    assert "more than 1 members" in refusal(file, content)
    monkeypatch.setattr(archives, "MOST_MEMBERS", 2)
    assert len(list(members(file))) == 2


@pytest.mark.parametrize("ending", [*PACKERS, ".zip"])
def test_broken_archives(ending, file):
    """R35: an archive cut anywhere, or one that is none, is refused with a line of ours, never silently shortened."""
    entries = list(FILES.items())
    whole = zip_of(*entries) if ending == ".zip" else PACKERS[ending](tar_of(*entries))
    filling = -(-len(tar_of(*entries).rstrip(b"\0")) // 512) * 512 + 512  # what follows the end of a plain tar
    step = max(1, len(whole) // 60)
    for length in range(0, len(whole) - 1, step):
        if ending == ".tar" and length >= filling:
            break
        message = refusal(file, whole[:length])
        assert "not a whole zip or tar archive" in message
    assert "not a whole" in refusal(file, b"text\n" * 300)
    with pytest.raises(DataError, match="not a whole"):
        list(members(file.with_name("nowhere.zip")))


@pytest.mark.parametrize("packer", PACKERS.values(), ids=PACKERS)
def test_a_debian_package_is_what_it_installs(packer, file):
    """The files that a package installs are read, whatever packs them; links among them are passed over."""
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        data = tar_of(*FILES.items(), ("./again", b""), type=kind, linkname="/etc/passwd")
        file.write_bytes(deb_of(("debian-binary", b"2.0\n"), ("control.tar", b"odd"), ("data.tar.xz/", packer(data))))
        assert dict(members(file)) == FILES


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([("debian-binary", b"2.0\n")], "a Debian package without data"),
        ([("data.tar.xz", lzma.compress(tar_of(("a", b"")))[:-9])], "not a whole"),
        ([("data.tar", tar_of(("../a", b"")))], "reaches outside"),
        ([("data.tar.zst", b"\x28\xb5\x2f\xfd" + bytes(600))], "not a whole"),
    ],
    ids=["empty", "cut", "outside", "unknown"],
)
def test_broken_debian_packages(parts, said, file):
    """R35: a package without files, one that is cut or packed in an unknown way, and one that reaches outside."""
    assert said in refusal(file, deb_of(*parts))


def test_a_debian_package_that_leads_nowhere(file):
    """R35: sizes that are no numbers, or that would lead back for ever, are refused at once."""
    for size in (b"-60       ", b"x         "):
        content = deb_of(("odd", b""))
        assert "not a whole" in refusal(file, content[:56] + size + content[66:])


def test_a_broken_header_is_not_the_end(file):
    """R35: a tar whose second header is damaged is refused, where `tarfile` would take it for the end."""
    content = bytearray(tar_of(*FILES.items()))
    content[1024 + 150] ^= 1
    file.write_bytes(content)
    with tarfile.open(file) as tar:
        assert len(tar.getnames()) == 1, "the control: tarfile does not see it"
    assert "no header at byte 1024" in refusal(file, bytes(content))


def test_a_flipped_byte_is_found(file):
    """R35: the checksum at the end of what is packed is checked, though the last member came before it."""
    content = bytearray(gzip.compress(tar_of(*FILES.items())))
    content[-6] ^= 1
    assert "not a whole" in refusal(file, bytes(content))


# Bombs: made in a moment, and each would be gigabytes unpacked.


MORE = gzip.compress(bytes(16 << 20), 9)  # 16 MiB of zeros, as often as they are wanted


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """The header of a tar member, without its content."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def zip_bomb() -> bytes:
    """A member that says it has one byte, and unpacks to 256 MiB."""
    content = bytearray(zip_of(("a", bytes(1 << 28))))
    for place, offset in ((content.index(b"PK\x03\x04"), 22), (content.index(b"PK\x01\x02"), 24)):
        struct.pack_into("<I", content, place + offset, 1)
    return bytes(content)


BOMBS = {
    "large member": (lambda: gzip.compress(header("a", 10 << 30)) + 640 * MORE, "has 10737418240 bytes"),
    "many members": (
        lambda: b"".join(gzip.compress(header(str(i), 16 << 20)) + MORE for i in range(64)),
        "unpack to more than 100 times",
    ),
    "long name": (
        lambda: gzip.compress(header("a", 10 << 30, tarfile.GNUTYPE_LONGNAME)) + 640 * MORE,
        "belong to no member",
    ),
    "extended header": (
        lambda: gzip.compress(header("a", 10 << 30, tarfile.XHDTYPE)) + 640 * MORE,
        "belong to no member",
    ),
    "folder with content": (
        lambda: gzip.compress(header("a", 10 << 30, tarfile.DIRTYPE)) + 640 * MORE,
        "belong to no member",
    ),
    "after the end": (lambda: gzip.compress(bytes(1024)) + 640 * MORE, "belong to no member"),
    "bzip2": (lambda: bz2.compress(header("a", 1 << 30) + bytes(80 << 20)), "unpack to more than 100 times"),
    "zip": (lambda: zip_of(("a", bytes(80 << 20))), "unpack to more than 100 times"),
    "zip that lies": (zip_bomb, "Bad CRC-32 for file"),
}
MEMORY = 250 << 20
READER = f"""
import resource, sys
from pathlib import Path
from sft_jax.archives import members
from sft_jax.errors import DataError
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
try:
    print(sum(len(content) for _, content in members(Path(sys.argv[1]))))
except DataError as error:
    print(error)
"""


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name, file):
    """R35: what would unpack to gigabytes is refused early, in bounded memory."""
    make, said = BOMBS[name]
    content = make()
    assert len(content) < 32 << 20
    file.write_bytes(content)
    done = subprocess.run([sys.executable, "-c", READER, str(file)], capture_output=True, text=True, check=True)
    assert said in done.stdout
