"""Images of rows: every mode becomes RGB as the reference has it, every source gives them, and nothing bad is lost."""

import gzip
import io
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features
from pictures import coloured, encode, noise, write_pictures
from PIL import Image
from transformers.image_utils import load_image

from sft_jax.config.data import DataSection
from sft_jax.config.tasks import ImageClassification
from sft_jax.data import images
from sft_jax.data.images import Picture, decode, encode_plain, read_images
from sft_jax.data.prepare import prepare
from sft_jax.data.records import Problem
from sft_jax.data.rows import Rows, plain
from sft_jax.data.sources import load_files, load_rows
from sft_jax.errors import DataError
from sft_jax.tasks.task import build_task

WHERE = "data.source.train"
GREY = noise(0, 7, 9)[..., 0]


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """An image of Pillow's as bytes."""
    held = io.BytesIO()
    image.save(held, form, **options)
    return held.getvalue()


def pictures(rows: Rows, column: str = "image") -> list[np.ndarray]:
    """The pixels of all rows, which must all be usable."""
    (found,), bad = read_images(rows, column, None)
    assert not bad
    return [picture.pixels() for picture in found]


def refused(content: bytes) -> Problem:
    """What is said of bytes that are no image."""
    found = decode(content)
    assert isinstance(found, Problem)
    return found


HELD = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"),
    "JPEG": ("1", "L", "RGB", "CMYK", "YCbCr"),
    "WEBP": ("L", "P", "RGB", "RGBA", "CMYK"),
    "GIF": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
}


@pytest.mark.parametrize(("form", "mode"), [(form, mode) for form, modes in HELD.items() for mode in modes])
def test_every_mode_is_rgb_as_pillow_converts_it(form, mode):
    """D7: grey, palette, alpha, CMYK and others are uint8 [h, w, 3], as `convert("RGB")` of the reference has them."""
    whole = Image.fromarray(noise(1, 7, 9)).convert("RGBA")
    image = whole.convert(mode) if mode in ("PA", "LA", "RGBA") else whole.convert("RGB").convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(GREY))
    content = saved(image, form)
    again = Image.open(io.BytesIO(content))
    again.info.pop("transparency", None)
    found = decode(content)
    assert isinstance(found, np.ndarray) and found.shape == (7, 9, 3) and found.dtype == np.uint8
    assert np.array_equal(found, np.asarray(again.convert("RGB")))


def test_of_sixteen_bits_the_upper_eight_stay():
    """D7: 16-bit grey is not cut off at 255, which `convert` of Pillow would do; what has no known range is refused."""
    deep = (GREY.astype(np.uint16) << 8) + 77
    for form in ("PNG", "TIFF"):
        found = decode(saved(Image.fromarray(deep), form))
        assert isinstance(found, np.ndarray)
        assert (found == GREY[..., None]).all()
    portable = b"P5\n9 7\n65535\n" + deep.astype(">u2").tobytes()
    assert np.array_equal(decode(portable), np.repeat(GREY[..., None], 3, axis=2))
    for values in (deep.astype(np.int32) << 4, GREY.astype(np.float32)):
        assert refused(saved(Image.fromarray(values), "TIFF")).reason == "unknown range"


@pytest.mark.parametrize("orientation", range(9))
def test_upright_as_the_reference_turns_it(orientation):
    """D7: an EXIF orientation is applied as `load_image` of transformers does; a broken one counts for nothing."""
    image, exif = Image.fromarray(noise(2, 6, 11)), Image.Exif()
    exif[0x0112] = orientation
    content = saved(image, "PNG", exif=exif)
    expected = np.asarray(load_image(Image.open(io.BytesIO(content))))
    assert np.array_equal(decode(content), expected)
    assert expected.shape == ((11, 6, 3) if orientation >= 5 else (6, 11, 3))


def test_broken_orientation_counts_for_nothing():
    """D7: EXIF data that cannot be read takes nothing from an image that can."""
    image = Image.fromarray(noise(2, 6, 11))
    content = saved(image, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f", quality=95)
    assert np.array_equal(decode(content), decode(saved(image, "JPEG", quality=95)))


def png_of(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and holds nothing."""
    content = bytearray(encode(noise(0, 1, 1)))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "reason", "said"),
    [
        (b"", "no image", "is no image in a form that is read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image", "is no image in a form that is read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no image", "is no image in a form that is read"),
        (encode(noise(0, 40, 40))[:900], "broken image", "cannot be decoded"),
        (encode(noise(0, 40, 40), "JPEG")[:900], "broken image", "cannot be decoded"),
        (png_of(20_000, 20_000), "image too large", "pixels"),
        (png_of(8_000, 8_000), "image too large", "8000 × 8000 pixels; an image has at most 50000000"),
        (png_of(3_000, 7), "image too narrow", "3000 × 7 pixels; edges are at most 1 to 100"),
    ],
    ids=["empty", "postscript", "svg", "cut png", "cut jpeg", "bomb", "large", "strip"],
)
def test_what_is_no_image_says_why(content, reason, said):
    """R35: truncated, foreign and huge images are told by kind, from the header where that is enough."""
    found = refused(content)
    assert found.reason == reason and said in found.text


def test_a_jpeg_of_too_many_scans_is_refused():
    """R35: each scan of a progressive JPEG goes over the whole image, so a small file could take hours."""
    content = encode(noise(0, 64, 64), "JPEG", progressive=True)
    assert isinstance(decode(content), np.ndarray) and content.count(b"\xff\xda") > 1
    begin = content.rindex(b"\xff\xda")
    assert refused(content[:begin] + content[begin:-2] * 400 + b"\xff\xd9").reason == "too many scans"


def test_equal_content_is_equal_whatever_holds_it(tmp_path):
    """C12: an image is told apart by its bytes, so that duplicates are found; it says its name, and goes by pickle."""
    one, other = encode(noise(0, 5, 5)), encode(noise(1, 5, 5))
    (tmp_path / "a.png").write_bytes(one)
    table = {"image": [one, other], "path": [str(tmp_path / "a.png")] * 2}
    rows = Rows(Dataset.from_dict(table), WHERE)
    (held,), (named,) = (read_images(rows, column, None)[0] for column in ("image", "path"))
    assert held[0] == named[0] == named[1] != held[1] and len({*held, *named}) == 2
    assert plain(held[0]).startswith("image ") and pickle.loads(pickle.dumps(held)) == held
    assert np.array_equal(pickle.loads(pickle.dumps(held))[1].pixels(), noise(1, 5, 5))


def test_a_file_that_changes_is_an_error(tmp_path):
    """C12: an image that is no longer what it was when rows were read stops the run, and is named."""
    file = tmp_path / "a.png"
    file.write_bytes(encode(noise(0, 5, 5)))
    rows = Rows(Dataset.from_dict({"image": [str(file)]}), WHERE)
    ((picture,),), _ = read_images(rows, "image", None)
    file.write_bytes(encode(noise(1, 5, 5)))
    with pytest.raises(DataError, match=r"a\.png: changed after rows were read: its bytes are others than before"):
        picture.pixels()
    file.unlink()
    with pytest.raises(DataError, match=r"a\.png: changed after rows were read: .* cannot be read"):
        picture.pixels()


def broken_rows(home: Path) -> Path:
    """Folders of labels with three whole images, and one bad file of each kind."""
    write_pictures(home, 3)
    for name, content in {"cut.png": encode(noise(0, 40, 40))[:700], "large.png": png_of(9_000, 9_000)}.items():
        (home / "blue" / name).write_bytes(content)
    (home / "red" / "notes.txt").write_text("no image")
    (home / "white").mkdir()
    return home


def test_bad_images_are_named_or_dropped(tmp_path):
    """R35: truncated and huge images, other files and empty folders are named by place and reason, all together."""
    home, rows = broken_rows(tmp_path / "train"), load_files([str(tmp_path / "train")], WHERE)
    task = build_task(ImageClassification(kind="image_classification"), {"train": rows})
    functions = (task.read, task.targets, task.classes, task.label_counts)

    def read(policy: str) -> Any:
        section = DataSection.model_validate(
            {"source": {"kind": "files", "train": str(home)}, "bad_rows": policy, "most_bad": 0.5}
        )
        return prepare({"train": rows}, section, *functions, 0)

    with pytest.raises(DataError) as caught:
        read("error")
    message = str(caught.value)
    for said in (
        "data.source.train: 4 problems",
        "red/notes.txt: ends in .txt, expected an image (.png, .jpg",
        "white: is empty; put files of that label there, or take it away",
        "blue/cut.png: image cannot be decoded (",
        "blue/large.png: image 9000 × 9000 pixels; an image has at most 50000000",
    ):
        assert said in message
    with pytest.raises(DataError, match=r"4 of 7 rows cannot be used \(no image: 1, "):
        read("drop")
    (home / "white").rmdir()
    rows = load_files([str(home)], WHERE)
    splits, report = read("drop")
    assert len(splits["train"]) == 3 and splits["train"].targets == [0, 1, 2]
    assert report.splits["train"].dropped == {"no image": 1, "broken image": 1, "image too large": 1}


def test_what_was_found_is_kept(tmp_path, monkeypatch):
    """C33: all images are decoded once only; whatever they are, what was found wrong is found again from the cache."""
    rows = load_files([str(broken_rows(tmp_path / "train"))], WHERE)
    home = tmp_path / "cache"
    (_,), first = read_images(rows, "image", home)
    assert len(first) == 2
    monkeypatch.setattr(images, "decode", lambda content: pytest.fail("decoded again"))
    (found,), again = read_images(rows, "image", home)
    assert again == first and sum(isinstance(one, Picture) for one in found) == 3
    write_pictures(tmp_path / "train", 4, seed=5)
    with pytest.raises(pytest.fail.Exception, match="decoded again"):
        read_images(load_files([str(tmp_path / "train")], WHERE), "image", home)


def zipped(home: Path) -> Path:
    """A folder as an archive beside it."""
    archive = home.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as packed:
        for file in sorted(home.rglob("*.*")):
            packed.write(file, f"data/{file.relative_to(home)}")
    return archive


def test_folders_on_the_disk_and_packed(tmp_path):
    """D7: a folder a label, plain or in an archive, gives the same images; on the disk they stay until needed."""
    home = write_pictures(tmp_path / "train", 7)
    plainly, packed = load_files([str(home)], WHERE), load_files([str(zipped(home))], WHERE)
    assert plainly.column("label") == packed.column("label") == ["blue"] * 3 + ["green"] * 2 + ["red"] * 2
    assert plainly.place(0) == packed.place(0) == "blue/000.png"
    assert plainly.column("image")[0] == {"bytes": None, "path": str(home / "blue" / "000.png")}
    for one, other in zip(pictures(plainly), pictures(packed), strict=True):
        assert np.array_equal(one, other)
    assert np.array_equal(pictures(plainly)[0], coloured(1)[0][1])


@pytest.mark.parametrize("form", ["save_to_disk", "parquet", "bytes", "paths"])
def test_data_sets_with_images(form, tmp_path):
    """D7: what `datasets` saved with an Image feature, Parquet files of it, columns of bytes and of paths are read."""
    expected = [found for _, found in coloured(4)]
    kind = Features({"image": datasets.Image(), "label": ClassLabel(names=["a", "b"])})
    table = Dataset.from_dict({"image": [Image.fromarray(p) for p in expected], "label": [0, 1, 0, 1]}, features=kind)
    if form == "save_to_disk":
        DatasetDict(train=table).save_to_disk(str(tmp_path / "saved"))
        source: dict[str, Any] = {"kind": "hub", "name": str(tmp_path / "saved")}
    elif form == "parquet":
        table.to_parquet(str(tmp_path / "rows.parquet"))
        source = {"kind": "files", "train": str(tmp_path / "rows.parquet")}
    elif form == "bytes":
        Dataset.from_dict({"image": [encode(p) for p in expected]}).to_parquet(str(tmp_path / "rows.parquet"))
        source = {"kind": "files", "train": str(tmp_path / "rows.parquet")}
    else:
        for number, found in enumerate(expected):
            (tmp_path / f"{number}.png").write_bytes(encode(found))
        (tmp_path / "rows.csv").write_text("\n".join(["image", *(str(tmp_path / f"{n}.png") for n in range(4))]))
        source = {"kind": "files", "train": str(tmp_path / "rows.csv")}
    section = DataSection.model_validate({"source": source})
    for one, other in zip(pictures(load_rows(section.source)["train"]), expected, strict=True):
        assert np.array_equal(one, other)


def idx(array: np.ndarray) -> bytes:
    """An array in IDX form."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def test_arrays(tmp_path):
    """D7: `.npz`, `.npy` and IDX files, packed or not, give their images as they are, and labels if there are some."""
    grey, colour, label = (
        GREY[None].repeat(3, axis=0) + np.arange(3, dtype=np.uint8)[:, None, None],
        noise(3, 6, 8),
        [3, 1, 2],
    )
    np.savez(tmp_path / "a.npz", image=grey, label=np.array(label), name=np.array(["x", "é", ""]))
    np.save(tmp_path / "b.npy", np.asfortranarray(colour[None]))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(grey)))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.array(label, np.uint8))))
    (tmp_path / "odd.images-idx3-ubyte").write_bytes(idx(grey))
    packed, single, old, bare = (
        load_files([str(tmp_path / name)], WHERE)
        for name in ("a.npz", "b.npy", "train-images-idx3-ubyte.gz", "odd.images-idx3-ubyte")
    )
    for rows in (packed, old, bare):
        assert np.array_equal(pictures(rows), grey[..., None].repeat(3, axis=3))
    assert packed.column("label") == old.column("label") == label and packed.column("name") == ["x", "é", ""]
    assert bare.names == single.names == ["image"] and np.array_equal(pictures(single)[0], colour)
    assert old.place(2).endswith("train-images-idx3-ubyte.gz, image 3")
    several = load_files([str(tmp_path / "a.npz"), str(tmp_path / "a.npz")], WHERE)
    assert several.column("label") == label * 2 and several.place(3).endswith("a.npz, image 1")


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": GREY[None]}, "it holds x, expected an array called image"),
        ({"image": GREY}, "image is uint8 [7, 9], expected uint8 with images, height, width"),
        ({"image": GREY[None].astype(np.float32)}, "image is float32 [1, 7, 9], expected uint8"),
        ({"image": GREY[None], "label": np.arange(2)}, "label is int64 [2], expected a number or text for each of 1"),
        ({"image": np.array([{}], object)}, "an array of Python objects, which are never unpickled"),
    ],
    ids=["name", "axes", "type", "labels", "objects"],
)
def test_arrays_of_other_shapes(arrays, said, tmp_path):
    """R35: arrays that are no images, or whose labels do not go with them, are one line; nothing is unpickled."""
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError) as caught:
        load_files([str(tmp_path / "a.npz")], WHERE)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\x08", b"\0\0\x0d\x03" + bytes(20), idx(GREY)[:-1], b"\0\0\x08\xff" + bytes(9)]
)
def test_broken_idx_files(content, tmp_path):
    """R35: an IDX file that is empty, cut, of other numbers, or claims more than it holds is one line."""
    (tmp_path / "images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=r"images-idx3-ubyte cannot be read \(") as caught:
        load_files([str(tmp_path / "images-idx3-ubyte")], WHERE)
    assert "\n" not in str(caught.value)


def test_columns_that_hold_no_images():
    """R35: a column of numbers is refused by name; a cell without an image, or with a path to nowhere, is a bad row."""
    rows = Rows(Dataset.from_dict({"image": ["/nowhere.png", None, ""], "label": [0, 1, 1]}), WHERE)
    with pytest.raises(DataError, match="column 'label' holds no images and no paths of any"):
        read_images(rows, "label", None)
    with pytest.raises(DataError, match="no column 'picture'; the rows have: image, label"):
        read_images(rows, "picture", None)
    (_,), bad = read_images(rows, "image", None)
    assert [bad[row].text for row in range(3)] == [
        "image '/nowhere.png' cannot be read (No such file or directory); check the path",
        "image is empty, expected an image",
        "image is empty, expected an image",
    ]


def test_plain_images_are_given_back():
    """D7: what arrays become, PGM and PPM, is decoded to what it was."""
    assert np.array_equal(decode(encode_plain(noise(4, 3, 5))), noise(4, 3, 5))
    assert np.array_equal(decode(encode_plain(GREY)), GREY[..., None].repeat(3, axis=2))
