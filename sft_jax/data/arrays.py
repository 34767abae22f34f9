"""Arrays of images as rows: `.npz`, `.npy`, and the IDX files of MNIST and its like, whose labels lie beside them.

Each image goes into its row as PGM or PPM, so that from here on it is an encoded image like any other. Files are
untrusted: nothing is unpickled, and sizes are those of the content, not those that a header claims.
"""

import gzip
import io
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features

from sft_jax.archives import LIMIT_BYTES, MOST_RATIO, SMALL_BYTES, members
from sft_jax.data.gather import shown
from sft_jax.data.images import FEATURE, encode_plain
from sft_jax.data.rows import Rows
from sft_jax.errors import DataError, reason

IMAGE, LABEL = "image", "label"
IDX = re.compile(r"(images|labels)[.-]idx[13]-ubyte(\.gz)?$")
IDX_BYTES = 0x08  # the type of its numbers, the only one of images
BROKEN = (OSError, EOFError, ValueError, TypeError, KeyError, SyntaxError, MemoryError, zlib.error, RecursionError)


def is_idx(file: str) -> bool:
    """Whether a file is of images in IDX form, by its name."""
    return IDX.search(file.lower()) is not None


def read_arrays(files: Sequence[str], where: str) -> Rows:
    """The rows of `.npz` and `.npy` files: `image` is uint8 [n, h, w] or [n, h, w, c], all else has a value a row."""
    return _rows(files, where, _numpy_arrays)


def read_idx(files: Sequence[str], where: str) -> Rows:
    """The rows of IDX files of images; labels are read from the file called `labels` where theirs says `images`."""
    return _rows(files, where, _idx_arrays)


def _rows(files: Sequence[str], where: str, read: Any) -> Rows:
    tables, file, line = [], [], []
    for number, name in enumerate(files):
        try:
            table = _table(read(Path(name).expanduser()))
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        except BROKEN as error:
            why = getattr(error, "strerror", None) or reason(error)
            raise DataError(f"{where}: {name} cannot be read ({why}); check the path and the file") from None
        tables.append(table)
        file.append(np.full(len(table), number, np.int32))
        line.append(np.arange(1, len(table) + 1))
        if table.column_names != tables[0].column_names:
            raise DataError(f"{where}: {files[0]} and {name} have other columns; give files of the same columns")
    joined = pa.concat_tables(tables, promote_options="permissive")
    kinds = {
        c: FEATURE if c == IMAGE else datasets.Value(str(joined.schema.field(c).type)) for c in joined.column_names
    }
    found = Dataset(joined, DatasetInfo(features=Features({**kinds})))
    places = tuple(f"{name}, image" for name in shown(files))
    return Rows(found, where, places, np.concatenate(file), np.concatenate(line))


def _table(arrays: Mapping[str, np.ndarray]) -> pa.Table:
    """A row for each image, its other values beside it."""
    if IMAGE not in arrays:
        raise ValueError(f"it holds {', '.join(arrays) or 'nothing'}, expected an array called {IMAGE}")
    images = _images(arrays[IMAGE])
    columns: dict[str, Any] = {}
    for name, values in arrays.items():
        if name == IMAGE:
            columns[name] = _cells([encode_plain(image) for image in images])
        elif values.ndim in (1, 2) and values.size == len(images) and values.dtype.kind in "iufUb":
            columns[name] = pa.array(values.ravel().tolist())
        else:
            said = f"{values.dtype} {list(values.shape)}"
            raise ValueError(f"{name} is {said}, expected a number or text for each of {len(images)} images")
    return pa.table(columns)


def _cells(encoded: Sequence[bytes]) -> pa.ChunkedArray:
    """A column of images as `FEATURE` has it; several arrays from 2 GiB on."""
    packed = pa.array(encoded, pa.binary())
    parts = packed.chunks if isinstance(packed, pa.ChunkedArray) else [packed]
    names = ("bytes", "path")
    made = [pa.StructArray.from_arrays([part, pa.nulls(len(part), pa.string())], names) for part in parts]
    return pa.chunked_array(made, FEATURE.pa_type)


def _images(array: np.ndarray) -> np.ndarray:
    """[n, h, w] or [n, h, w, 3] of grey levels; of other channels what RGB needs."""
    channels = array.shape[3] if array.ndim == 4 else 1
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or channels not in (1, 3, 4) or 0 in array.shape[1:]:
        raise ValueError(
            f"{IMAGE} is {array.dtype} {list(array.shape)}, expected uint8 with images, height, width and perhaps "
            f"channels, in this order"
        )
    return array if array.ndim == 3 else array[..., 0] if channels == 1 else array[..., :3]


def _numpy_arrays(file: Path) -> dict[str, np.ndarray]:
    if file.suffix.lower() == ".npy":
        return {IMAGE: _array(file.read_bytes())}
    return {name.removesuffix(".npy"): _array(content) for name, content in members(file)}


def _array(content: bytes) -> np.ndarray:
    """The array of an `.npy` file, which holds no objects."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in header:
        raise ValueError(f"version {version} of the npy format")
    try:
        shape, columns, kind = header[version](stream)
    except Exception as error:  # it is read as Python is, which fails in many ways
        raise ValueError(reason(error)) from None
    if kind.hasobject:
        raise ValueError("an array of Python objects, which are never unpickled")
    flat = np.frombuffer(content, kind, offset=stream.tell())  # of its real size, whatever the header says
    return flat.reshape(shape, order="F" if columns else "C")


def _idx_arrays(file: Path) -> dict[str, np.ndarray]:
    beside = file.with_name(re.sub("images([.-])idx3", r"labels\1idx1", file.name))
    found = {IMAGE: _idx(file)}
    return {**found, LABEL: _idx(beside)} if beside != file and beside.is_file() else found


def _idx(file: Path) -> np.ndarray:
    """The array of an IDX file: two zeros, the type, the number of axes, their lengths, and the bytes."""
    content = _unpacked(file)
    if len(content) < 4 or content[:3] != bytes([0, 0, IDX_BYTES]):
        raise ValueError(f"begins with {content[:4].hex(' ')}, expected 00 00 08: bytes in IDX form")
    begin = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:begin], ">u4").astype(np.int64).tolist()
    return np.frombuffer(content, np.uint8, offset=begin).reshape(shape)


def _unpacked(file: Path) -> bytes:
    """The content of a file, which may be packed by gzip."""
    if file.suffix.lower() != ".gz":
        return file.read_bytes()
    most = min(max(MOST_RATIO * file.stat().st_size, SMALL_BYTES), LIMIT_BYTES)
    with gzip.open(file) as packed:
        content = packed.read(most + 1)
    if len(content) > most:
        raise ValueError(f"unpacks to more than {most} bytes, which no honest file does")
    return content
