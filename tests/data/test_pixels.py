"""Pixels of a batch: what is drawn depends on seed, visit and image alone, and workers make what this process makes."""

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from pictures import SQUARE, encode, noise
from scipy import stats

from sft_jax.config.data import Images, Layout
from sft_jax.data import loader, pixels
from sft_jax.data.batch import Batch, Encoded, declare
from sft_jax.data.images import read_images
from sft_jax.data.loader import EvalBatches, TrainBatches, padding_share, prefetch
from sft_jax.data.order import Order
from sft_jax.data.pixels import Blend, Changes, blend, changed, encode_pictures
from sft_jax.data.processor import Processor, read_processor
from sft_jax.data.rows import Rows
from sft_jax.errors import DataError

PROCESSOR = read_processor(SQUARE, "here")
ALL = {"flip": 0.5, "crop": 0.3, "pad": 2, "rand_augment": 2, "mixup": 0.4, "cutmix": 0.6}


def documents(count: int) -> Encoded:
    """Images of odd sizes."""
    draw = np.random.default_rng(0)
    encoded = [encode(noise(n, *draw.integers(9, 31, 2).tolist())) for n in range(count)]
    (found,), bad = read_images(Rows(Dataset.from_dict({"image": encoded}), "here"), "image", None)
    assert not bad
    return encode_pictures(found, np.arange(count, dtype=np.int32) % 3, PROCESSOR)


def batches_of(encoded: Encoded, size: int, multiple: int = 1, seed: int = 0, **section: Any) -> TrainBatches:
    """Twelve batches of these documents."""
    order, images = Order(len(encoded), size, 0), Images(**section)
    shapes = declare(Layout(), encoded, order, multiple)
    return TrainBatches(changed(encoded, images, seed), order, shapes, 12, blend=blend(images, seed))


def same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    """Whether two batches are the same to the last bit."""
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def by_visit(batches: TrainBatches) -> dict[tuple[int, int], np.ndarray]:
    """The pixels of each (document, visit) of all batches."""
    found = {}
    for step in range(len(batches)):
        batch, (read, visits) = batches[step], batches.order.visits(step)
        assert batch["index"][: len(read), 0].tolist() == read.tolist()
        found |= dict(zip(zip(read.tolist(), visits.tolist(), strict=True), batch["pixel_values"], strict=False))
    return found


@pytest.fixture(scope="module")
def seven() -> Encoded:
    """Seven images."""
    return documents(7)


@pytest.mark.parametrize("section", [{"flip": 0.5}, {"crop": 0.3}, {"pad": 2}, {"rand_augment": 2}], ids=str)
def test_changes_depend_on_image_and_visit_alone(seven, section):
    """C11, C32: an image is changed alike in batches of any size, on any number of devices; anew on each visit."""
    one, other = by_visit(batches_of(seven, 3, **section)), by_visit(batches_of(seven, 7, multiple=4, **section))
    both = one.keys() & other.keys()
    assert len(both) >= 28 and all(np.array_equal(one[key], other[key]) for key in both)
    for visit in (1, 2, 3):
        assert any(not np.array_equal(one[n, 0], one[n, visit]) for n in range(7)), "the same on each visit"
    again = by_visit(batches_of(seven, 3, seed=1, **section))
    assert any(not np.array_equal(one[key], again[key]) for key in one), "the same with each seed"


def test_batches_are_a_pure_function_of_the_step(seven):
    """C11, R18: with every change and both ways of mixing, any batch is the same in any order and after a resume."""
    batches = batches_of(seven, 3, **ALL)
    in_turn = list(prefetch(batches, 0, 3))
    assert len(in_turn) == 12 and all(same(batches[step], in_turn[step]) for step in (11, 3, 7))
    assert all(same(batch, in_turn[5 + k]) for k, batch in enumerate(prefetch(batches, 5, 2))), "resumed in an epoch"


def test_evaluation_draws_nothing(seven):
    """C16: what is evaluated on are the processor's own images, filler rows are 0, and nothing is mixed."""
    batches = batches_of(seven, 4, **ALL)
    evals = EvalBatches.of(batches.encoded, batches.shapes[0], 4, 4)
    found = [evals[number] for number in range(len(evals))]
    made = np.concatenate([batch["pixel_values"] for batch in found])
    lazy = seven.lazy["pixel_values"]
    assert isinstance(lazy, pixels.PixelValues)
    expected = [PROCESSOR.normalise(PROCESSOR.shape(picture.pixels())) for picture in lazy.pictures]
    assert np.array_equal(made[:7], np.stack(expected)) and not made[7:].any()
    assert not {"label_other", "label_share"} & found[0].keys()
    plain = batches_of(seven, 3)
    assert plain.encoded is seven and plain.blend is None, "without settings nothing is changed"


class TestEachChange:
    """D7: what each change does, seen on one image of the processor's size."""

    image = noise(5, 16, 16)

    def made(self, document: int, visit: int = 0, processor: Processor = PROCESSOR, **section: Any) -> np.ndarray:
        """The image after these changes."""
        return Changes(Images(**section), 0)(self.image, processor, document, visit)

    def test_flip(self):
        """About the share that was asked for is mirrored, left to right; the others stay as they are."""
        mirrored = [np.array_equal(self.made(n, flip=0.3), self.image[:, ::-1]) for n in range(200)]
        stays = [np.array_equal(self.made(n, flip=0.3), self.image) for n in range(200)]
        assert all(a != b for a, b in zip(mirrored, stays, strict=True)) and 40 <= sum(mirrored) <= 80

    def test_pad(self):
        """A window of the image with its black edge: each of the 25 shifts of up to two pixels occurs."""
        padded = np.pad(self.image, ((2, 2), (2, 2), (0, 0)))
        windows = {padded[y : y + 16, x : x + 16].tobytes() for y in range(5) for x in range(5)}
        found = {self.made(n, pad=2).tobytes() for n in range(400)}
        assert found == windows

    def test_crop(self):
        """A part of the least share or more, of a shape from 3:4 to 4:3, in the size that is asked for."""
        seen: list[tuple[int, int]] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                pixels, "resized", lambda part, size, how: seen.append(part.shape[:2]) or np.zeros((*size, 3))
            )
            for number in range(300):
                self.made(number, crop=0.25)
        shares = [h * w / 256 for h, w in seen]
        assert min(shares) > 0.2 and max(shares) > 0.8 and {h > w for h, w in seen} == {True, False}
        assert all(0.6 < h / w < 1.6 for h, w in seen)
        assert self.made(0, crop=0.25).shape == (16, 16, 3)

    @pytest.mark.parametrize("shape", [(3, 90), (90, 3), (1, 1)])
    def test_crop_of_a_strip(self, shape):
        """Where no part of such a shape fits, the middle is taken."""
        found = Changes(Images(crop=0.9), 0)(noise(0, *shape), PROCESSOR, 3, 4)
        assert found.shape == (16, 16, 3)

    @pytest.mark.parametrize("number", range(len(pixels.SIGNED) + len(pixels.UNSIGNED)))
    def test_every_operation(self, number):
        """Each of the fourteen operations gives an image of the same size, and more change with more strength."""
        slope = np.linspace(20, 140, 16 * 16).reshape(16, 16, 1) + np.array([0, 20, 40])
        which, smooth = (number + 0.5) / 14, (slope + self.image % 32).astype(np.uint8)
        made = {strength: pixels._operate(smooth, which, 0.2, strength) for strength in (0, 15, 30)}
        assert all(found.shape == (16, 16, 3) and found.dtype == np.uint8 for found in made.values())
        moved = [np.abs(found.astype(int) - smooth).mean() for found in made.values()]
        constant = number in (len(pixels.SIGNED), 12, 13)  # nothing; and two without a strength
        assert moved[0] == moved[2] if constant else moved[0] < 1 < moved[2] and moved[1] <= moved[2]
        if number < len(pixels.SIGNED):
            assert not np.array_equal(made[30], pixels._operate(smooth, which, 0.8, 30)), "no direction"


def mixed(section: dict[str, float], rows: int = 64) -> tuple[Batch, Batch]:
    """A batch of images of one grey level each, before and after they are mixed; two rows are filler."""
    grey = (
        np.arange(rows, dtype=np.float32)[:, None, None, None].repeat(10, axis=1).repeat(12, axis=2).repeat(3, axis=3)
    )
    index = np.arange(rows)[:, None].astype(np.int32)
    index[-2:], grey[-2:] = -1, 0
    batch = {"pixel_values": grey, "index": index, "label": np.arange(rows)[:, None]}
    return batch, Blend(Images(**section), 0)(batch, np.zeros(rows - 2, int))


@pytest.mark.parametrize("section", [{"mixup": 0.8}, {"cutmix": 0.8}, {"mixup": 0.8, "cutmix": 0.8}], ids=str)
def test_images_and_labels_are_mixed_in_the_same_share(section):
    """D7: of each image as much is its own as of the loss, the rest is that of the other label; filler stays."""
    batch, found = mixed(section)
    own, other, share = (found[name][:62, 0] for name in ("label", "label_other", "label_share"))
    assert np.array_equal(own, np.arange(62)) and sorted(other) == list(range(62)) and not (own == other).any()
    assert ((share >= 0) & (share <= 1)).all() and share.std() > 0.15
    mean = found["pixel_values"][:62].mean(axis=(1, 2, 3))
    np.testing.assert_allclose(mean, share * own + (1 - share) * other, rtol=1e-4, atol=1e-3)
    assert (found["label_share"][62:] == 1).all() and not found["pixel_values"][62:].any()
    levels = [len(np.unique(image)) for image in found["pixel_values"][:62]]
    cut = [count == 2 for count in levels]
    assert any(cut) == ("cutmix" in section) and all(cut) <= ("mixup" not in section)
    assert np.array_equal(batch["pixel_values"][:62, 0, 0, 0], np.arange(62)), "the batch that was given has changed"


def test_shares_are_of_a_beta_distribution():
    """D7: the share of mixup is drawn from Beta(alpha, alpha) as in its paper."""
    _, found = mixed({"mixup": 0.4}, rows=2002)
    assert stats.kstest(found["label_share"][:2000, 0], stats.beta(0.4, 0.4).cdf).pvalue > 0.01
    assert stats.kstest(found["label_share"][:2000, 0], stats.beta(1, 1).cdf).pvalue < 1e-6, "the control"


@pytest.mark.parametrize("count", [1, 2])
def test_small_batches_are_mixed_too(count):
    """D7: an image alone in its batch is mixed with itself; of two, each with the other."""
    _, found = mixed({"mixup": 1.0}, rows=count + 2)
    assert found["label_other"][:count, 0].tolist() == [[0], [1, 0]][count - 1]


def test_padding_is_known_without_pixels(seven, monkeypatch):
    """C32: what share is filler is told without making a single image."""
    monkeypatch.setattr(pixels.PixelValues, "__call__", lambda *given: pytest.fail("made"))
    assert padding_share(batches_of(seven, 4, multiple=4, **ALL)) == pytest.approx(1 / 8)


def test_workers_make_the_same_batches(seven):
    """R18, C32: two workers give ids and pixels equal to those of this process, in order, after a resume too."""
    batches = batches_of(seven, 3, **ALL)
    made = list(prefetch(replace(batches, workers=2), 2, 3))
    assert len(made) == 10 and all(same(batches[2 + k], batch) for k, batch in enumerate(made))
    first = list(itertools.islice(prefetch(replace(batches, workers=1), 0, 1), 2))
    assert all(same(batches[k], batch) for k, batch in enumerate(first)), "not all are asked for"


WORKER = """
import sys
from sft_jax.data import loader
print(sorted({"jax", "flax", "torch", "tensorflow", "grain"} & sys.modules.keys()))
"""


def test_workers_need_no_jax():
    """R18: what a worker imports to make batches holds no jax, so that none can run there."""
    done = subprocess.run([sys.executable, "-c", WORKER], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


class Broken(Encoded):
    """Documents of which a worker dies."""

    def lengths_of(self, documents: Any) -> np.ndarray:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_worker_that_is_killed_is_one_line(seven):
    """R35: a worker that dies is an error that says what to do, not a traceback or a wait for ever."""
    batches = batches_of(seven, 3)
    broken = replace(batches, workers=1, encoded=Broken(seven.tokens, seven.offsets, seven.documents))
    with pytest.raises(DataError, match=r"data\.workers: a worker process did not begin, or was killed"):
        next(prefetch(broken, 0, 2))


def test_what_a_worker_finds_wrong_is_said(tmp_path):
    """R35: a file that changed while training is named by the worker that reads it."""
    file = tmp_path / "a.png"
    file.write_bytes(encode(noise(0, 9, 9)))
    (found,), _ = read_images(Rows(Dataset.from_dict({"image": [str(file)]}), "here"), "image", None)
    encoded = encode_pictures(found, np.zeros(1, np.int32), PROCESSOR)
    file.write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.png: changed after rows were read"):
        next(prefetch(replace(batches_of(encoded, 1), workers=1), 0, 1))


ORPHANS = """
import json, multiprocessing, os, signal
import numpy as np
from sft_jax.data.batch import Encoded, Shape
from sft_jax.data.loader import TrainBatches, prefetch
from sft_jax.data.order import Order
if __name__ == "__main__":
    encoded = Encoded({}, np.arange(5), {})
    next(prefetch(TrainBatches(encoded, Order(4, 2, 0), (Shape(2, 1, 1),), 9, workers=2), 0, 2))
    print(json.dumps([child.pid for child in multiprocessing.active_children()]), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_worker_outlives_its_process(tmp_path):
    """R18: where the first process is killed at once, its workers end too."""
    (tmp_path / "program.py").write_text(ORPHANS)
    environment = {**os.environ, "PYTHONPATH": str(Path(loader.__file__).parents[2])}
    command = [sys.executable, str(tmp_path / "program.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    # What it said is at its end: no worker holds the pipe any more.
    assert done.returncode == -signal.SIGKILL and len(json.loads(done.stdout)) == 2
