"""TFDS data sets prepared as array records: written by TFDS itself, read without TensorFlow or code of the data set."""

import importlib.util
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import WORDS
from datasets import ClassLabel, List, Value
from made_tfds import write
from pictures import coloured, encode

from sft_jax import run
from sft_jax.config.data import Tfds
from sft_jax.data.images import FEATURE, read_images
from sft_jax.data.sources import load_rows
from sft_jax.errors import DataError

LABELS = ["bad", "good"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the data sets `reviews` (20 and 6 rows), `pictures` and `odd`, of all kinds of columns."""
    home = tmp_path_factory.mktemp("tfds")
    known = tfds.features
    rows = [{"text": f"{word} é 🎉", "label": i % 2} for i, word in enumerate(WORDS[:26])]
    with tfds.core.registered.skip_registration():
        features = {"text": known.Text(), "label": known.ClassLabel(names=LABELS)}
        write(home, "reviews", features, {"train": rows[:20], "test": rows[20:]})
        odd = {
            "text": known.Text(),
            "score": np.float32,
            "count": np.int64,
            "flag": np.bool_,
            "tags": known.Sequence(known.Text()),
            "labels": known.Sequence(known.ClassLabel(names=LABELS)),
            "numbers": known.Sequence(np.int64),
            "pair": known.Tensor(shape=(2,), dtype=np.float32),
            "grid": known.Tensor(shape=(2, 2), dtype=np.float32),
            "nested": {"inner": np.int64},
        }
        row = {
            "text": "plain", "score": 0.5, "count": 2**40, "flag": True, "tags": ["a", "é"], "labels": [1, 0],
            "numbers": [], "pair": [1.0, 2.0], "grid": np.zeros((2, 2), np.float32), "nested": {"inner": 1},
        }  # fmt: skip
        broken = [{**row, "text": b"caf\xe9"}, {**row, "tags": ["a", b"\xff"]}]
        pictures = {"image": known.Image(shape=(None, None, 3)), "label": known.ClassLabel(names=LABELS)}
        pictures |= {"frames": known.Sequence(known.Image(shape=(4, 4, 3)))}
        seen = [
            {"image": io.BytesIO(encode(found)), "label": i % 2, "frames": []}
            for i, (_, found) in enumerate(coloured(14))
        ]
        write(home, "pictures", pictures, {"train": seen[:10], "test": seen[10:]})
        write(home, "odd", odd, {"train": [row, *broken, {**row, "count": -1}]})
    return home


def load(home: Path, **options: Any) -> dict[str, Any]:
    """The rows of a source in this directory."""
    return load_rows(Tfds.model_validate({"kind": "tfds", "name": "reviews", "data_dir": str(home), **options}))


def test_rows_are_what_was_written(home):
    """Texts, labels with their names and the order of rows come back from array records, split by split."""
    found = load(home, test="test")
    assert found.keys() == {"train", "test"} and [len(rows) for rows in found.values()] == [20, 6]
    assert found["train"].column("text") == [f"{word} é 🎉" for word in WORDS[:20]]
    assert found["test"].column("label") == [i % 2 for i in range(20, 26)]
    assert found["train"].table.features == {"text": Value("string"), "label": ClassLabel(names=LABELS)}
    assert found["test"].place(5) == "row 6" and found["test"].select([5]).place(0) == "row 6"


def test_slices_are_read(home):
    """A split may be a slice, by share or by number, and slices side by side are all of it."""
    found = load(home, train="train[:80%]", validation="train[80%:]", test="train[3:5]")
    assert [len(rows) for rows in found.values()] == [16, 4, 2]
    assert found["train"].column("text") + found["validation"].column("text") == [f"{w} é 🎉" for w in WORDS[:20]]
    assert found["test"].column("text") == [f"{word} é 🎉" for word in WORDS[3:5]]


def test_columns_of_every_kind(home):
    """Numbers, truth values and lists arrive as such; grids and nested columns are none; broken UTF-8 is a bad row."""
    rows = load(home, name="odd")["train"]
    first = {
        "text": "plain", "score": 0.5, "count": 2**40, "flag": True, "tags": ["a", "é"], "labels": [1, 0],
        "numbers": [], "pair": [1.0, 2.0],
    }  # fmt: skip
    assert rows.table.to_list() == [first, {**first, "count": -1}]
    assert rows.table.features["labels"] == List(ClassLabel(names=LABELS))
    assert rows.table.features["pair"] == List(Value("float32"))
    assert [(bad.place, bad.reason, bad.text[:30]) for bad in rows.bad] == [
        ("row 2", "broken UTF-8", "text: not UTF-8 (byte 0xe9 at "),
        ("row 3", "broken UTF-8", "tags: not UTF-8 (byte 0xff at "),
    ]
    assert [rows.place(i) for i in range(2)] == ["row 1", "row 4"]


def test_images_are_read_as_they_lie_there(home):
    """D7: an image is the encoded bytes of its record, decoded by us; lists of images are no column."""
    found = load(home, name="pictures", test="test")
    assert found["train"].table.features == {"image": FEATURE, "label": ClassLabel(names=LABELS)}
    assert found["train"].column("image")[0]["bytes"].startswith(b"\x89PNG")
    (pictures,), bad = read_images(found["test"], "image", None)
    assert not bad
    for picture, (_, expected) in zip(pictures, coloured(14)[10:], strict=True):
        assert np.array_equal(picture.pixels(), expected)


def test_a_name_may_hold_a_version(home):
    """`name:version` is that version; another one is refused."""
    assert len(load(home, name="reviews:1.0.0")["train"]) == 20
    with pytest.raises(DataError, match=r"'reviews:2\.0\.0' \(split 'train'\) is not to be had from"):
        load(home, name="reviews:2.0.0")


@pytest.mark.parametrize(
    "options",
    [
        {"name": "unheard_of"},
        {"name": "../reviews"},
        {"name": ""},
        {"name": "reviews/config"},
        {"train": "dev"},
        {"train": "train[:x]"},
        {"data_dir": "/nowhere"},
    ],
    ids=str,
)
def test_what_is_not_there_is_one_clear_line(home, options):
    """A data set, split or directory that is not there is one line with place, name and remedy; nothing is fetched."""
    with pytest.raises(DataError) as caught:
        load(home, **options)
    message = str(caught.value)
    assert message.startswith("data.source.train: '") and "is not to be had from" in message and "\n" not in message
    assert message.endswith("prepare it with file_format='array_record', and check name, split and data_dir")


@pytest.mark.parametrize("damage", ["tfrecord", "no description", "half a file", "a third"])
def test_a_damaged_or_other_form_is_one_clear_line(home, damage, tmp_path):
    """What was prepared as tfrecord, or was damaged since, is one line with the remedy."""
    made = Path(shutil.copytree(home / "reviews", tmp_path / "reviews")) / "1.0.0"
    if damage == "tfrecord":
        described = json.loads((made / "dataset_info.json").read_text())
        (made / "dataset_info.json").write_text(json.dumps({**described, "fileFormat": "tfrecord"}))
    elif damage == "no description":
        (made / "features.json").unlink()
    else:
        for file in made.glob("*train.array_record*"):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // (2 if damage == "half a file" else 3)])
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert message.startswith("data.source.train: 'reviews'") and "\n" not in message and "; prepare it" in message


def test_no_tensorflow(home):
    """TensorFlow is neither installed nor imported, and TFDS only where a source needs it."""
    assert importlib.util.find_spec("tensorflow") is None
    program = f"""
import sys
from sft_jax.config.data import Tfds
from sft_jax.data.images import FEATURE, read_images
from sft_jax.data.sources import load_rows
assert "tensorflow_datasets" not in sys.modules
assert len(load_rows(Tfds(kind="tfds", name="reviews", data_dir={str(home)!r}))["train"]) == 20
assert not {{"tensorflow", "jax", "torch"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_run_is_prepared_from_it(home, configure):
    """A whole run is laid out on a TFDS source, its labels called as the data set calls them."""
    source = (
        f"{{kind: tfds, name: reviews, data_dir: {home}, train: 'train[:75%]', validation: 'train[75%:]', test: test}}"
    )
    found = run.prepare(configure(f"data.source={source}"))
    assert found.task.labels == ("bad", "good")
    assert {split: len(rows) for split, rows in found.rows.items()} == {"train": 15, "validation": 5, "test": 6}
