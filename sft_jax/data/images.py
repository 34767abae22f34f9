"""Images of rows: told apart by their bytes, read when they are needed, and decoded to RGB without ever a crash.

Decoding follows `transformers.image_utils.load_image`, and `datasets`, which agree: the first frame, turned upright as
its EXIF tag says, then Pillow's `convert("RGB")`. So transparency is dropped, not blended with a colour; CMYK, palettes
and grey become RGB; of 16 bits the upper 8 stay, where Pillow would cut all of them off at 255.

Files are untrusted: only the decoders of `FORMATS` are tried, the header is judged before anything is decoded, and what
is too large, too narrow or has too many scans is refused. Knows no model and no task.
"""

import base64
import hashlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL
from datasets import Dataset
from jaxtyping import UInt8
from PIL import Image

from sft_jax.data import cache
from sft_jax.data.records import Problem
from sft_jax.data.rows import Bad, Rows
from sft_jax.errors import DataError, reason

Pixels = UInt8[np.ndarray, "h w 3"]

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # PPM: what arrays become
MOST_BYTES = 1 << 27  # of an encoded image
MOST_PIXELS = 50_000_000
MOST_RATIO = 100  # of the longer edge to the shorter: a strip made 224 pixels wide would not fit into memory
MOST_SCANS = 200  # of a progressive JPEG, each of which goes over the whole image
ORIENTATION = 0x0112
TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation -> what makes it upright
VERSION = "1"  # of `decode`: another one, and what is in caches is not found any more
FEATURE = datasets.Image(decode=False)  # of a column: {"bytes": ..., "path": ...}, one of which is there
AT_ONCE = 64  # images that are read together

# What is wrong with an image is said of its row.
logging.getLogger("PIL").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True, eq=False, slots=True)
class Picture:
    """An encoded image of a table; equal to any other one of the same bytes."""

    digest: bytes  # sha256 of what is encoded
    table: Dataset  # whose one column holds it
    row: int

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Picture) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __str__(self) -> str:
        return f"image {self.digest.hex()[:12]}"

    def read(self) -> bytes:
        """Its bytes, which must be those that it had when rows were read."""
        cell = self.table[self.row]["image"]
        content = _content(cell)
        if isinstance(content, Problem) or hashlib.sha256(content).digest() != self.digest:
            why = content.text if isinstance(content, Problem) else "its bytes are others than before"
            raise DataError(f"{_path(cell) or self}: changed after rows were read: {why}; leave files as they are")
        return content

    def pixels(self) -> Pixels:
        """The image that it encodes."""
        found = decode(self.read())
        if isinstance(found, Problem):  # of rows that were not read by `read_images`
            raise DataError(f"{self}: {found.text}")
        return found


def decode(content: bytes) -> Pixels | Problem:
    """The image that these bytes encode, or what is wrong with them; never raises for what they hold."""
    if len(content) > MOST_BYTES:
        return Problem("image too large", f"{len(content)} bytes; an image has at most {MOST_BYTES}")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return _oversized(image, content) or _rgb(_upright(image))
    except PIL.UnidentifiedImageError:
        return Problem("no image", f"is no image in a form that is read ({', '.join(FORMATS)})")
    except Image.DecompressionBombError:
        return Problem("image too large", f"more than {MOST_PIXELS} pixels; make it smaller")
    except Exception as error:  # decoders raise what they like
        return Problem("broken image", f"cannot be decoded ({reason(error, 100)}); save it again")


def read_images(rows: Rows, column: str, home: Path | None) -> tuple[tuple[list[Any], ...], dict[int, Bad]]:
    """(the images of a column, what is wrong with the rows that have none that can be used).

    Every image is decoded once, in parallel, to know; what was found is kept below `home` under a hash of all bytes.
    """
    table = _images(rows, column)
    found: list[Any] = []
    bad: dict[int, Bad] = {}

    def refuse(row: int, problem: Problem) -> None:
        bad[row] = Bad(rows.place(row), problem.reason, f"{column} {problem.text}")
        found[row] = None

    for row, digest in enumerate(_each(_digest, _cells(table))):
        found.append(None if isinstance(digest, Problem) else Picture(digest, table, row))
        if isinstance(digest, Problem):
            refuse(row, digest)
    pictures = [picture for picture in found if picture is not None]
    for row, problem in _checked(pictures, home).items():
        refuse(row, problem)
    return (found,), bad


def image_files(place: Path) -> list[Path]:
    """The images that lie in a folder, sorted by name; an image itself; none of what is neither."""
    found = sorted(place.iterdir()) if place.is_dir() else [place]
    return [file for file in found if file.suffix.lower() in ENDINGS and not file.name.startswith(".")]


def thumbnail(picture: Picture, edge: int = 64) -> str:
    """A small JPEG of an image as a `data:` address."""
    small, held = Image.fromarray(picture.pixels()), io.BytesIO()
    small.thumbnail((edge, edge))
    small.save(held, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"


def encode_plain(pixels: np.ndarray) -> bytes:
    """uint8 [h, w] or [h, w, 3] as PGM or PPM, which any decoder gives back as it is, at once."""
    height, width = pixels.shape[:2]
    return f"P{5 if pixels.ndim == 2 else 6}\n{width} {height}\n255\n".encode() + pixels.tobytes()


def in_threads(function: Callable[[Any], Any], values: Sequence[Any], threads: int) -> list[Any]:
    """The function of each value, in order; Pillow lets other threads work while it does."""
    if threads < 2 or len(values) < 2:
        return [function(value) for value in values]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, values))


def _each(function: Callable[[Any], Any], values: Iterable[Any]) -> Iterator[Any]:
    """As `in_threads`, on all cores, some at a time."""
    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        rest = iter(values)
        while parts := [part for _ in range(threads) if (part := list(islice(rest, AT_ONCE)))]:
            for found in pool.map(lambda part: [function(value) for value in part], parts):
                yield from found


def _images(rows: Rows, column: str) -> Dataset:
    """A table with the one column `image`, cells as `FEATURE` has them."""
    if column not in rows.names or column in {*rows.written, *rows.unfit}:
        paths = [one.get("path") if isinstance(one, dict) else one for one in rows.column(column)]
        return Dataset.from_dict({"image": [one if isinstance(one, str) else None for one in paths]})
    table = rows.table.select_columns([column])
    table = table.rename_column(column, "image") if column != "image" else table
    kind = table.features["image"]
    if isinstance(kind, datasets.Image):
        return table if kind == FEATURE else table.cast_column("image", FEATURE)
    plain = isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string", "binary", "large_binary")
    if not plain and not (isinstance(kind, dict) and {"bytes", "path"} & kind.keys()):
        raise DataError(f"{rows.where}: column '{column}' holds no images and no paths of any; name another one")
    return table


def _cells(table: Dataset) -> Iterator[Any]:
    for part in table.iter(AT_ONCE):
        columns: Any = part
        yield from columns["image"]


def _path(cell: Any) -> str | None:
    return cell if isinstance(cell, str) else cell.get("path") if isinstance(cell, dict) else None


def _content(cell: Any) -> bytes | Problem:
    """The bytes of a cell: its own, or those of the file that it names."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    path = _path(cell)
    if isinstance(content, bytes):
        return content
    if not path:
        return Problem("no image", "is empty, expected an image")
    try:
        file = Path(path).expanduser()
        size = file.stat().st_size
        if size > MOST_BYTES:
            return Problem("image too large", f"{size} bytes; an image has at most {MOST_BYTES}")
        return file.read_bytes() if file.is_file() else Problem("no image", f"{path!r:.200} is no file")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or reason(error)
        return Problem("no image", f"{path!r:.200} cannot be read ({why}); check the path")


def _digest(cell: Any) -> bytes | Problem:
    content = _content(cell)
    return content if isinstance(content, Problem) else hashlib.sha256(content).digest()


def _checked(pictures: Sequence[Picture], home: Path | None) -> dict[int, Problem]:
    """What is wrong with images, by their rows; equal ones are decoded once."""
    unlike = list(dict.fromkeys(pictures))
    name = cache.key([VERSION, PIL.__version__, *sorted(picture.digest for picture in unlike)])
    held = cache.load(home, name) if home else None
    if held is None:
        found = zip(unlike, _each(_problem, unlike), strict=True)
        problems = {picture.digest: problem for picture, problem in found if problem}
        held = {"digest": np.frombuffer(b"".join(problems), np.uint8).reshape(-1, 32)}
        held |= {field: np.array([getattr(p, field) for p in problems.values()], "U") for field in Problem._fields}
        if home:
            cache.store(home, name, held)
    columns = (held["digest"], *(held[field].tolist() for field in Problem._fields))
    broken = {digest.tobytes(): Problem(str(why), str(text)) for digest, why, text in zip(*columns, strict=True)}
    return {picture.row: broken[picture.digest] for picture in pictures if picture.digest in broken}


def _problem(picture: Picture) -> Problem | None:
    found = decode(picture.read())
    return found if isinstance(found, Problem) else None


def _oversized(image: Image.Image, content: bytes) -> Problem | None:
    """Why an image is not decoded, by its header."""
    width, height = image.size
    if width * height > MOST_PIXELS:
        return Problem("image too large", f"{width} × {height} pixels; an image has at most {MOST_PIXELS}")
    if max(width, height) > MOST_RATIO * min(width, height):
        return Problem("image too narrow", f"{width} × {height} pixels; edges are at most 1 to {MOST_RATIO}")
    scans = content.count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 0
    return Problem("too many scans", f"{scans} scans; save it again") if scans > MOST_SCANS else None


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = TURNED.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # of broken EXIF data, beside an image that may be whole
        turn = None
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Pixels | Problem:
    if image.mode == "F":
        return Problem("unknown range", "holds floating-point numbers of no known range; save it in 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() >= 1 << 16:
            return Problem("unknown range", "holds numbers beyond 16 bits; save it in 8 or 16 bits")
        return np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    image.load()
    image.info.pop("transparency", None)  # or Pillow warns that it is dropped
    return np.asarray(image.convert("RGB"))
