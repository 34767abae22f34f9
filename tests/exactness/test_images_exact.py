"""Runs on images: resumed in an epoch to the last bit, whatever prepares the batches and on however many devices."""

import importlib.util
import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from exact_runs import differing, metrics_lines, take_steps, train_until
from made_tfds import write
from pictures import LABELS, VIT, coloured, encode, settings, write_pictures, write_vision

from sft_jax.config.read import read_config
from sft_jax.config.schema import Config
from sft_jax.data.loader import prefetch
from sft_jax.jobs import train, trained
from sft_jax.run import prepare

CHANGES = "data.images={flip: 0.5, crop: 0.5, pad: 1, rand_augment: 1, mixup: 0.4, cutmix: 0.4}"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with a tiny ViT and pictures: 20 to train on, that is four steps an epoch."""
    home = tmp_path_factory.mktemp("exact-images")
    for seed, (split, count) in enumerate((("train", 20), ("validation", 6), ("test", 6))):
        write_pictures(home / "images" / split, count, seed)
    write_vision(home / "model", VIT)
    return home


def config(home, directory, *more: str):
    """A run with every change of images in a directory of its own."""
    return read_config([], settings(directory, home / "model", home / "images", CHANGES, *more))


def test_resumed_in_an_epoch(home, tmp_path):
    """C11: a run on changed and mixed images that is stopped in its first epoch ends as the unbroken one, bit for bit;
    what goes on takes its batches from worker processes."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(prepare(config(home, whole)))
    train_until(config(home, broken), 3)
    train(prepare(config(home, broken, "data.workers=2")))
    one, other = (trained(prepare(config(home, place)), "latest")[0] for place in (whole, broken))
    assert differing(one, other) == []
    assert metrics_lines(whole / "run") == metrics_lines(broken / "run")


@pytest.mark.parametrize("devices", ["mesh.data=4", "mesh={data: 2, fsdp: 2}"])
def test_devices_and_microbatches_change_nothing(home, tmp_path, devices):
    """C32, C3: on several devices, and in microbatches, steps read the same images and come to the same losses."""
    one = prepare(config(home, tmp_path / "one"))
    several = prepare(config(home, tmp_path / "several", devices, "train.accumulate=2"))
    for step in range(4):
        a, b = one.batches[step], several.batches[step]
        count = int(a["weight"].sum())
        for name in ("pixel_values", "label", "label_other", "label_share", "index"):
            assert np.array_equal(a[name][:count], b[name][:count])
        assert len(b["index"]) == 8 and not b["pixel_values"][count:].any()
    np.testing.assert_allclose(take_steps(one, 3).losses, take_steps(several, 3).losses, rtol=2e-5)


def test_array_records_go_on_in_an_epoch(home, tmp_path):
    """C11: batches of images in array records are the same after a stop in an epoch, and so is what is trained on them;
    TensorFlow has no part in it."""
    kinds = {"image": tfds.features.Image(shape=(None, None, 3)), "label": tfds.features.ClassLabel(names=LABELS)}
    seen = [{"image": io.BytesIO(encode(found)), "label": LABELS.index(label)} for label, found in coloured(14)]
    with tfds.core.registered.skip_registration():
        write(tmp_path, "pictures", kinds, {"train": seen})

    def made(place: str) -> Config:
        more = [
            f"run.dir={tmp_path / place}",
            f"data.source={{kind: tfds, name: pictures, data_dir: {tmp_path}, train: 'train[:8]'}}",
            "eval.every=never",
            "data.images={flip: 0.5, crop: 0.5, mixup: 0.3}",
            "train.batch_size=3",
        ]
        given = [setting for setting in settings(home, home / "model", home) if not setting.startswith("data.source")]
        return read_config([], [*given, *more])

    train(prepare(made("whole")))
    train_until(made("broken"), 2)
    again = prepare(made("broken"))
    held = [again.batches[step] for step in range(2, 6)]
    resumed = list(prefetch(again.batches, 2, 2))
    assert len(resumed) == 4 and all(differing(a, b) == [] for a, b in zip(resumed, held, strict=True))
    assert train(again).steps == 6
    assert metrics_lines(tmp_path / "whole") == metrics_lines(tmp_path / "broken")
    assert importlib.util.find_spec("tensorflow") is None
