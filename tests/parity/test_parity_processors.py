"""Images become the same numbers as in the Pillow processors of `transformers`, bit for bit, at odd sizes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import encode, noise
from PIL import Image
from transformers import image_utils
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from sft_jax.data.images import decode
from sft_jax.data.processor import DEFAULTS, load_processor, processor_files
from sft_jax.errors import ModelError

THEIRS: dict[str, Any] = {
    "ViTImageProcessor": ViTImageProcessorPil,
    "ConvNextImageProcessor": ConvNextImageProcessorPil,
    "BitImageProcessor": BitImageProcessorPil,
}
SIZES = [(31, 47), (47, 31), (20, 20), (9, 70), (70, 9), (1, 1), (33, 8)]
SQUARE, EDGE = {"height": 18, "width": 22}, {"shortest_edge": 21}
CROP = {"do_center_crop": True, "crop_size": {"height": 17, "width": 20}}
SETTINGS = {
    "ViTImageProcessor": [
        {"size": SQUARE},
        {"size": 19},
        {"size": [18, 23]},
        {"size": SQUARE, **CROP},
        {"size": SQUARE, "do_normalize": False},
        {"size": SQUARE, "do_rescale": False},
        {"size": SQUARE, "do_rescale": False, "do_normalize": False},
        {"size": SQUARE, "rescale_factor": 0.0039, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.3, 0.5, 0.9]},
        {"size": SQUARE, "image_mean": 0.4, "image_std": 0.2},
        {"size": EDGE, "do_center_crop": True, "crop_size": 16},
        {"do_resize": False, **CROP},
    ],
    "ConvNextImageProcessor": [
        {"size": EDGE},
        {"size": 21, "crop_pct": 0.8},
        {"size": EDGE, "crop_pct": 1.0},
        {"size": {"shortest_edge": 19}},
        {"size": {"shortest_edge": 384}},
        {"size": EDGE, **CROP},
    ],
    "BitImageProcessor": [
        {"size": EDGE, **CROP},
        {"size": 24, "crop_size": 20},
        {"size": {"shortest_edge": 12}, **CROP},
        {"size": SQUARE, "do_center_crop": False},
        {"do_resize": False, **CROP},
    ],
}


def write(home: Path, **settings: Any) -> Path:
    """A directory with a processor's file."""
    (home / "preprocessor_config.json").write_text(json.dumps(settings))
    return home


def both(home: Path, kind: str, settings: dict[str, Any], height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(ours, theirs) of an image of this size, channels last."""
    processor, pixels = load_processor(write(home, image_processor_type=kind, **settings)), noise(height, height, width)
    theirs = THEIRS[kind](**settings)(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    return processor.normalise(processor.shape(pixels)), theirs.transpose(1, 2, 0)


@pytest.mark.parametrize(
    ("kind", "settings"), [(kind, settings) for kind, found in SETTINGS.items() for settings in found], ids=str
)
def test_equal_to_the_reference(kind, settings, tmp_path):
    """D7: each type and each of its settings gives the numbers of the reference, whatever the size of the image."""
    for height, width in SIZES:
        ours, theirs = both(tmp_path, kind, settings, height, width)
        assert ours.dtype == np.float32 and np.array_equal(ours, theirs.astype(np.float32)), (height, width)


@pytest.mark.parametrize("resample", image_utils.PILImageResampling)
@pytest.mark.parametrize("kind", SETTINGS)
def test_every_interpolation(kind, resample, tmp_path):
    """D7: each way of resampling that a file may name is the one that is used."""
    settings = {**SETTINGS[kind][0], "resample": int(resample)}
    for height, width in SIZES:
        assert np.array_equal(*both(tmp_path, kind, settings, height, width))
    other = {**settings, "resample": (int(resample) + 1) % 6}
    assert not np.array_equal(both(tmp_path, kind, settings, 31, 47)[0], both(tmp_path, kind, other, 31, 47)[0])


@pytest.mark.parametrize("kind", SETTINGS)
def test_defaults_are_those_of_the_reference(kind, tmp_path):
    """D7: what a file does not say is what the reference takes, at the published sizes."""
    for height, width in ((300, 517), (100, 130)):
        assert np.array_equal(*both(tmp_path, kind, {}, height, width))
    assert DEFAULTS.keys() == THEIRS.keys()


PUBLISHED = {  # as they lie on the hub
    "resnet": {
        "crop_pct": 0.875, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "ConvNextFeatureExtractor", "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225], "resample": 3, "size": 224,
    },
    "vit": {
        "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "ViTImageProcessor", "image_std": [0.5, 0.5, 0.5], "resample": 2,
        "rescale_factor": 0.00392156862745098, "size": {"height": 224, "width": 224},
    },
    "dinov2": {
        "crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "do_convert_rgb": True,
        "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "BitImageProcessor", "image_std": [0.229, 0.224, 0.225], "resample": 3,
        "rescale_factor": 0.00392156862745098, "size": {"shortest_edge": 256},
    },
}  # fmt: skip


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_files(model, tmp_path):
    """D7: the files of resnet-50, vit-base and dinov2 are read as `AutoImageProcessor` reads them, down to pixels."""
    from transformers import AutoImageProcessor

    (tmp_path / "config.json").write_text(json.dumps({"model_type": model}))
    content = encode(noise(3, 240, 301), "JPEG")
    (tmp_path / "picture.jpg").write_bytes(content)
    ours, pixels = load_processor(write(tmp_path, **PUBLISHED[model])), decode(content)
    theirs = AutoImageProcessor.from_pretrained(str(tmp_path), backend="pil")
    expected = theirs(image_utils.load_image(str(tmp_path / "picture.jpg")), return_tensors="np")["pixel_values"][0]
    assert isinstance(pixels, np.ndarray) and ours.size == (224, 224)
    assert np.array_equal(ours.normalise(ours.shape(pixels)), expected.transpose(1, 2, 0))


@pytest.mark.parametrize("model", PUBLISHED)
@pytest.mark.parametrize("size", [56, 448])
@pytest.mark.parametrize("whole", [False, True])
def test_another_size_is_exported(model, size, whole, tmp_path):
    """D7: with a size of one's own, what is exported is read by the reference as images of that size, equally made."""
    from transformers import AutoImageProcessor

    write(tmp_path, **PUBLISHED[model])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model}))
    ours, files = load_processor(tmp_path, size, whole=whole), processor_files(tmp_path, size, whole=whole)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    theirs, pixels = AutoImageProcessor.from_pretrained(str(tmp_path), backend="pil"), noise(4, 130, 99)
    expected = theirs(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    assert expected.shape == (size, size, 3) and ours.size == (size, size)
    assert np.array_equal(ours.normalise(ours.shape(pixels)), expected)
    assert np.array_equal(load_processor(tmp_path).normalise(pixels), ours.normalise(pixels))
    framed = np.zeros((128, 128, 3), np.uint8)
    framed[[0, -1]] = framed[:, [0, -1]] = 255  # what is cut off, if anything is
    assert bool(ours.shape(framed)[0].any()) == (whole or model == "vit" or (model == "resnet" and size >= 384))


def test_a_file_is_exported_as_it_is(tmp_path):
    """D7: without another size an export holds the very bytes of the checkpoint's file."""
    write(tmp_path, **PUBLISHED["vit"])
    assert processor_files(tmp_path) == {
        "preprocessor_config.json": (tmp_path / "preprocessor_config.json").read_bytes()
    }


VIT = {"image_processor_type": "ViTImageProcessor"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"image_processor_type": "CLIPSegProcessor"},
            "image_processor_type is 'CLIPSegProcessor'; those computed here",
        ),
        ({}, "image_processor_type is 'None'; those computed here are ViTImageProcessor, ConvNextImageProcessor"),
        ({**VIT, "do_pad": True, "do_reduce_labels": True}, "2 problems\n  - do_pad: True, which is not computed here"),
        (
            {**VIT, "size": {"longest_edge": 9}},
            "size: {'longest_edge': 9}, expected height and width, or shortest_edge",
        ),
        ({**VIT, "size": {"height": 0, "width": 9}}, "size: {'height': 0, 'width': 9}, expected"),
        ({**VIT, "size": 10**9}, "size: {'height': 1000000000"),
        ({**VIT, "size": {"shortest_edge": 9}}, "images would keep sizes of their own; set size with height and width"),
        ({**VIT, "do_resize": False}, "images would keep sizes of their own"),
        ({**VIT, "resample": 17}, "17 is not a valid Resampling"),
        ({**VIT, "image_std": [1, 0, 1]}, "image_std: [1.0, 0.0, 1.0] is not above 0"),
        ({**VIT, "image_mean": [1, 2]}, "image_mean: [1, 2], expected three numbers"),
        ({**VIT, "rescale_factor": "1/255"}, "rescale_factor: '1/255', expected a number"),
        ({**VIT, "rescale_factor": float("nan")}, "rescale_factor: nan, expected a number"),
        (
            {"image_processor_type": "ConvNextImageProcessor", "crop_pct": 0},
            "crop_pct: 0.0 is not above 0 and at most 1",
        ),
        ({"image_processor_type": "ConvNextImageProcessor", "size": SQUARE}, "size: expected shortest_edge"),
        (
            {**VIT, "do_center_crop": True, "crop_size": {"shortest_edge": 3}},
            "crop_size: {'shortest_edge': 3}, expected",
        ),
    ],
    ids=str,
)
def test_what_is_not_computed_is_refused(settings, said, tmp_path):
    """D7, R35: types and settings that are not computed, and values that mean nothing, are refused by name."""
    with pytest.raises(ModelError) as caught:
        load_processor(write(tmp_path, **settings))
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "preprocessor_config.json")) and said in message


@pytest.mark.parametrize("content", [None, "", "[1]", "{", "[" * 10_000])
def test_files_that_are_none(content, tmp_path):
    """R35: a processor's file that is missing or broken is one line that names it."""
    if content is not None:
        (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(ModelError, match=r"preprocessor_config\.json") as caught:
        load_processor(tmp_path)
    assert "\n" not in str(caught.value) and "fetch it" in str(caught.value)
