"""Images that nobody would take: damaged anywhere, of any mode, or made to fill memory; never a crash, but a word."""

import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import budget, told
from hypothesis import given
from hypothesis import strategies as st
from pictures import SQUARE, VIT, encode, noise, write_pictures, write_vision
from PIL import Image

from sft_jax.config.read import read_config
from sft_jax.data.images import MOST_PIXELS, MOST_RATIO, decode
from sft_jax.data.processor import load_processor
from sft_jax.data.records import Problem
from sft_jax.errors import SftError
from sft_jax.run import prepare


def whole() -> dict[str, bytes]:
    """An image of each form, and of each mode that has ways of its own."""
    pixels, made = noise(0, 19, 23), {}
    for form in ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "PPM"):
        made[form] = encode(pixels, form)
    made["progressive"] = encode(pixels, "JPEG", progressive=True)
    for mode in ("P", "LA", "1", "CMYK"):
        held = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(held, "TIFF" if mode == "CMYK" else "PNG")
        made[mode] = held.getvalue()
    for name, form in (("deep", "PNG"), ("packed", "TIFF")):
        held = io.BytesIO()
        options = {"compression": "tiff_lzw"} if form == "TIFF" else {}
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(held, form, **options)
        made[name] = held.getvalue()
    return made


WHOLE = whole()
changes = st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 255)), max_size=6)


@budget(150)
@given(
    st.sampled_from(sorted(WHOLE)),
    changes,
    st.none() | st.integers(0, 1 << 30),
    st.binary(max_size=9),
    st.integers(0, 64),
)
def test_damaged_images(name, changed, end, inserted, at):
    """R35: whatever becomes of an image's bytes, they are an image of bounded size, or one line says what is wrong."""
    content = bytearray(WHOLE[name])
    for place, value in changed:
        content[place % len(content)] = value
    content[at:at] = inserted
    found = decode(bytes(content[: None if end is None else end % len(content)]))
    if isinstance(found, Problem):
        assert found.text and "\n" not in found.text and len(found.text) < 400
    else:
        assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3 and found.size <= 3 * MOST_PIXELS
        assert max(found.shape[:2]) <= MOST_RATIO * min(found.shape[:2])


@budget(60)
@given(
    st.binary(max_size=60)
    | st.sampled_from([b"BM", b"GIF89a", b"II*\0", b"P6 9 9 ", b"\xff\xd8\xff"]).map(lambda b: b * 9)
)
def test_bytes_that_are_no_image(content):
    """R35: any bytes at all are an image or one line."""
    found = decode(content)
    assert isinstance(found, Problem) or found.ndim == 3


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, content: bytes, *more: bytes) -> bytes:
    """A PNG of one byte a pixel, with these packed bytes."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


ZEROS = zlib.compress(bytes(1 << 28), 9)  # 256 MiB
BOMBS = {
    "large png": png(16_000, 16_000, ZEROS),
    "more than it says": png(64, 64, ZEROS),
    "text": png(64, 64, zlib.compress(bytes(64 * 65)), chunk(b"zTXt", b"a\0\0" + ZEROS)),
    "colours": png(64, 64, zlib.compress(bytes(64 * 65)), chunk(b"iCCP", b"a\0\0" + ZEROS)),
    "bitmap": b"BM" + struct.pack("<IIIIiiHHII", 54, 0, 54, 40, 40_000, 40_000, 1, 24, 0, 0) + bytes(16),
    "ppm": b"P6\n60000 60000\n255\n",
    "gif": (
        b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\x80\0\0\0\0\0\xff\xff\xff"
        + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02L\x01\0;"
    ),
    "tiff": (
        b"II*\0\x08\0\0\0\x04\0" + struct.pack("<HHII", 256, 4, 1, 60_000) + struct.pack("<HHII", 257, 4, 1, 60_000)
        + struct.pack("<HHII", 259, 3, 1, 1) + struct.pack("<HHII", 273, 4, 1, 8) + bytes(4)
    ),
}  # fmt: skip
MEMORY = 1 << 30
READER = """
import resource, sys
from pathlib import Path
from sft_jax.data.images import decode
from sft_jax.data.records import Problem
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for file in sys.argv[1:]:
    found = decode(Path(file).read_bytes())
    print(Path(file).name, "refused" if isinstance(found, Problem) else found.shape)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def test_bombs(tmp_path):
    """R35: small files that would be gigabytes once decoded are refused, or cost no more than they say, in 200 MiB."""
    files = []
    for name, content in BOMBS.items():
        assert len(content) < 1 << 20
        files.append(tmp_path / name)
        files[-1].write_bytes(content)
    command = [sys.executable, "-c", READER, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    *lines, used = done.stdout.splitlines()
    said = dict(line.rsplit(" ", 1) if line.endswith("refused") else line.split(" (") for line in lines)
    assert len(said) == len(BOMBS) and int(used) < 200
    assert all(said[name] == "refused" for name in ("large png", "bitmap", "ppm", "gif", "tiff"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with a tiny model and a folder of pictures."""
    home = tmp_path_factory.mktemp("hostile-images")
    write_vision(home / "model", VIT)
    write_pictures(home / "train", 6)
    return home


@budget(25)
@given(
    st.sampled_from(sorted(WHOLE)),
    changes,
    st.sampled_from(
        ["blue/x.png", "red/x.JPG", "white/x.gif", "x.png", "red/a/x.png", "red/x", "red/.x.png", "\u202e/é\n.png"]
    ),
    st.sampled_from(["error", "drop"]),
)
def test_folders_with_anything_in_them(home, name, changed, path, policy):
    """R35: a folder with a file that is anything, called anything, is prepared or refused in words that say where."""
    content = bytearray(WHOLE[name])
    for place, value in changed:
        content[place % len(content)] = value
    file = home / "train" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(bytes(content))
    given_settings = [
        f"model.source={home / 'model'}",
        "task.kind=image_classification",
        f"data.source={json.dumps({'kind': 'files', 'train': str(home / 'train')})}",
        f"data.bad_rows={policy}",
        "eval.every=never",
        "mesh.data=1",
        f"run.dir={home / 'run'}",
    ]
    try:
        batch = prepare(read_config([], given_settings)).batches[0]
        assert np.isfinite(batch["pixel_values"]).all()
    except SftError as error:
        told(error)
    finally:
        file.unlink()
        for folder in ("white", "red/a", "\u202e"):
            if (home / "train" / folder).is_dir():
                (home / "train" / folder).rmdir()


values: Any = st.none() | st.booleans() | st.integers(-9, 999) | st.floats() | st.text(max_size=4)
values = (
    values
    | st.lists(values, max_size=4)
    | st.dictionaries(st.sampled_from(["height", "width", "shortest_edge"]), values)
)
KEYS = ["size", "crop_size", "resample", "image_mean", "image_std", "rescale_factor", "crop_pct", "do_resize",
        "do_center_crop", "do_rescale", "do_normalize", "do_pad", "x"]  # fmt: skip


@budget(80)
@given(
    st.dictionaries(st.sampled_from(KEYS), values, max_size=4),
    st.sampled_from(["ViTImageProcessor", "ConvNextImageProcessor", "BitImageProcessor", None, 3]),
)
def test_processors_of_anything(home, settings, kind):
    """R35: a processor's file that says anything is one that makes images of one size, or is refused by name."""
    directory = home / "processor"
    directory.mkdir(exist_ok=True)
    found = {**SQUARE, "image_processor_type": kind, **settings}
    (directory / "preprocessor_config.json").write_text(json.dumps(found))
    try:
        processor = load_processor(directory)
    except SftError as error:
        assert str(Path("processor") / "preprocessor_config.json") in told(error)
        return
    sizes = {processor.normalise(processor.shape(noise(0, *shape))).shape for shape in ((9, 30), (30, 9), (1, 1))}
    assert sizes == {(*processor.size, 3)}
