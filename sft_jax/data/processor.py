"""Image processors: from decoded images to what a model reads, as `preprocessor_config.json` says it.

Equal to the Pillow ("slow") processors of `transformers` to the last bit, which compute in this order: resize, centre
crop, rescale, normalise. What cannot be computed as they do is refused by name. Knows no model and no task.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from sft_jax.data.images import Pixels
from sft_jax.errors import ModelError, listing, reason

FILE, CONFIG = "preprocessor_config.json", "config.json"
STANDARD, CLIP = (0.5, 0.5, 0.5), (0.48145466, 0.4578275, 0.40821073)
# What the processors of `transformers` take for what a file does not say.
DEFAULTS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": {
        "size": {"height": 224, "width": 224}, "resample": 2, "image_mean": STANDARD, "image_std": STANDARD,
    },
    "ConvNextImageProcessor": {
        "size": {"shortest_edge": 384}, "resample": 3, "image_mean": STANDARD, "image_std": STANDARD,
        "crop_pct": 224 / 256,
    },
    "BitImageProcessor": {
        "size": {"shortest_edge": 224}, "resample": 3, "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224}, "image_mean": CLIP,
        "image_std": (0.26862954, 0.26130258, 0.27577711),
    },
}  # fmt: skip
OF_MODELS = {"vit": "ViTImageProcessor", "resnet": "ConvNextImageProcessor", "dinov2": "BitImageProcessor"}
COMMON = {
    "do_resize": True, "do_center_crop": False, "crop_size": None, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "do_convert_rgb": None, "crop_pct": None,
}  # fmt: skip
# Settings that change nothing here: names, and how arrays come and go.
IDLE = {
    "image_processor_type", "feature_extractor_type", "processor_class", "_processor_class", "_valid_processor_keys",
    "data_format", "input_data_format", "default_to_square", "return_tensors", "device", "disable_grouping",
    "_valid_kwargs_names", "model_input_names",
}  # fmt: skip
SQUARE_FROM = 384  # edge from which ConvNeXT's processor squeezes images in place of cropping them
MOST_EDGE = 4096  # of what a model reads


class Size(NamedTuple):
    """Height and width in pixels."""

    height: int
    width: int


@dataclass(frozen=True, eq=False)
class Processor:
    """How decoded images become what a model reads."""

    resize: Size | int | None  # to a size whatever the shape, or the shorter edge to so many pixels
    crops: tuple[Size, ...]  # centre crops, one after the other
    resample: Image.Resampling
    table: Float32[np.ndarray, "256 3"]  # what each grey level of each channel becomes
    home: Path | None = None  # where its work is kept, so that it is not done twice

    @property
    def size(self) -> Size:
        """Of the images that come out."""
        assert isinstance(self.resize, Size) or self.crops
        return self.crops[-1] if self.crops else self.resize  # type: ignore[return-value]

    def shape(self, pixels: Pixels) -> UInt8[np.ndarray, "H W 3"]:
        """An image resized and cropped."""
        if self.resize is not None:
            pixels = resized(pixels, _target(pixels, self.resize), self.resample)
        for size in self.crops:
            pixels = cropped(pixels, size)
        return pixels

    def normalise(self, pixels: UInt8[np.ndarray, "*n h w 3"]) -> Float32[np.ndarray, "*n h w 3"]:
        """Images rescaled and normalised."""
        return self.table[pixels, np.arange(3)]


def load_processor(directory: Path, size: int | None = None, *, whole: bool = False) -> Processor:
    """The image processor of a checkpoint's directory; with `size` for square images of so many pixels.

    Of `whole` square images nothing is cut off around the middle, whatever the processor does.
    """
    return read_processor(_settings(directory, size, whole), str(directory / FILE))


def processor_files(directory: Path, size: int | None = None, *, whole: bool = False) -> dict[str, bytes]:
    """The file that an image processor consists of, for an export; as it is where no other size is asked for."""
    if size is None and (directory / FILE).is_file():
        return {FILE: (directory / FILE).read_bytes()}
    return {FILE: (json.dumps(_settings(directory, size, whole), indent=2, sort_keys=True) + "\n").encode()}


def read_processor(settings: Mapping[str, Any], where: str) -> Processor:
    """The processor that the content of a `preprocessor_config.json` describes; `transformers` is not asked."""
    kind = str(settings["image_processor_type"])
    if kind not in DEFAULTS:
        raise ModelError(
            f"{where}: image_processor_type is {kind!r:.60}; those computed here are {', '.join(DEFAULTS)}"
        )
    known = {**COMMON, **DEFAULTS[kind]}
    problems = [
        f"{name}: {value!r:.60}, which is not computed here"
        for name, value in settings.items()
        if name not in known and name not in IDLE and value not in (None, False)
    ]
    if problems:
        raise ModelError(listing(f"{where}; leave out", problems))
    said = {**known, **{name: value for name, value in settings.items() if value is not None and name in known}}
    try:
        return _processor(kind, said)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ModelError(f"{where}: {reason(error)}; fetch it again, or mend it") from None


def resized(pixels: Pixels, size: Size, resample: Image.Resampling) -> Pixels:
    """An image in another size, by Pillow."""
    return np.asarray(Image.fromarray(pixels).resize((size.width, size.height), resample))


def cropped(pixels: Pixels, size: Size) -> Pixels:
    """The middle of an image; what there is not enough of is black."""
    height, width = pixels.shape[:2]
    room = Size(max(size.height, height), max(size.width, width))
    above, left = -((height - room.height) // 2), -((width - room.width) // 2)  # the larger half where it is odd
    if room != (height, width):
        whole = np.zeros((*room, 3), np.uint8)
        whole[above : above + height, left : left + width] = pixels
        pixels = whole
    top, begin = (height - size.height) // 2 + above, (width - size.width) // 2 + left
    return pixels[top : top + size.height, begin : begin + size.width]


def _settings(directory: Path, size: int | None, whole: bool) -> dict[str, Any]:
    """The content of the file, with the name of the processor; of old files that is named by the model's type."""
    file = directory / FILE
    if not file.is_file():
        raise ModelError(f"{directory}: has no {FILE}, which says how images are made for the model; fetch it")
    found = _object(file)
    kind = found.get("image_processor_type") or found.get("feature_extractor_type")
    if kind is None and (directory / CONFIG).is_file():
        kind = OF_MODELS.get(str(_object(directory / CONFIG).get("model_type")))
    plain = str(kind).removesuffix("Pil").removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
    found = {**found, "image_processor_type": plain}
    return found if size is None else {**found, **_resized(read_processor(found, str(file)), plain, size, whole)}


def _resized(processor: Processor, kind: str, edge: int, whole: bool) -> dict[str, Any]:
    """The settings that differ for another size; what is cut off around the middle stays the same share, or is none."""
    square = {"height": edge, "width": edge}
    if kind == "ConvNextImageProcessor":  # which crops by a share of its own
        return {"size": {"shortest_edge": edge}, "do_center_crop": False, **({"crop_pct": 1.0} if whole else {})}
    if whole:
        return {"size": square, "do_center_crop": False}
    if not processor.crops:
        return {"size": square}
    share = edge / min(processor.size)
    if isinstance(processor.resize, int):
        return {"size": {"shortest_edge": round(processor.resize * share)}, "crop_size": square}
    around = {name: round(value * share) for name, value in (processor.resize or processor.size)._asdict().items()}
    return {"size": around, "crop_size": square}


def _object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: cannot be read ({reason(error)}); fetch it again") from None
    if not isinstance(found, dict):
        raise ModelError(f"{file}: holds a {type(found).__name__}, expected an object; fetch it again")
    return found


def _processor(kind: str, said: Mapping[str, Any]) -> Processor:
    square = kind == "ViTImageProcessor"
    resize = _size(said["size"], "size", square=square) if said["do_resize"] else None
    crop = _size(said["crop_size"], "crop_size", square=True) if said["do_center_crop"] else None
    crops = (crop,) if isinstance(crop, Size) else ()
    if kind == "ConvNextImageProcessor" and resize is not None:
        if not isinstance(resize, int):
            raise ValueError("size: expected shortest_edge")
        edge, share = Size(resize, resize), _number(said["crop_pct"], "crop_pct")
        if not 0 < share <= 1:
            raise ValueError(f"crop_pct: {share} is not above 0 and at most 1")
        resize, crops = (edge, crops) if resize >= SQUARE_FROM else (int(resize / share), (edge, *crops))
    if not crops and not isinstance(resize, Size):
        raise ValueError("images would keep sizes of their own; set size with height and width, or do_center_crop")
    return Processor(resize, crops, Image.Resampling(said["resample"]), _levels(said))


def _levels(said: Mapping[str, Any]) -> Float32[np.ndarray, "256 3"]:
    """What each grey level becomes, in the types that the reference computes in."""
    values = np.arange(256, dtype=np.uint8)
    if said["do_rescale"]:
        values = (values.astype(np.float64) * _number(said["rescale_factor"], "rescale_factor")).astype(np.float32)
    levels = np.repeat(values.astype(np.float32)[:, None], 3, axis=1)
    if not said["do_normalize"]:
        return levels
    mean, std = (np.asarray(_numbers(said[name], name), np.float32) for name in ("image_mean", "image_std"))
    if not (std > 0).all():
        raise ValueError(f"image_std: {std.tolist()} is not above 0")
    return (levels - mean) / std


def _size(value: Any, name: str, *, square: bool) -> Size | int:
    """A size in any of the forms that files have: {height, width}, {shortest_edge}, a number, or two."""
    if type(value) is int:
        value = {"height": value, "width": value} if square else {"shortest_edge": value}
    if isinstance(value, list | tuple) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    given = {key: edge for key, edge in value.items() if edge is not None} if isinstance(value, Mapping) else {}
    edges = [edge for edge in given.values() if type(edge) is int and 0 < edge <= MOST_EDGE]
    if len(edges) < len(given) or given.keys() not in ({"height", "width"}, {"shortest_edge"}):
        raise ValueError(f"{name}: {value!r:.80}, expected height and width, or shortest_edge, up to {MOST_EDGE}")
    if name == "crop_size" and "shortest_edge" in given:
        raise ValueError(f"{name}: {value!r:.80}, expected height and width")
    return given["shortest_edge"] if "shortest_edge" in given else Size(given["height"], given["width"])


def _target(pixels: Pixels, resize: Size | int) -> Size:
    if isinstance(resize, Size):
        return resize
    height, width = pixels.shape[:2]
    longer = int(resize * max(height, width) / min(height, width))
    return Size(longer, resize) if width <= height else Size(resize, longer)


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise ValueError(f"{name}: {value!r:.60}, expected a number")
    return float(value)


def _numbers(value: Any, name: str) -> list[float]:
    """A number for each of the three channels."""
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * 3
    if len(values) != 3:
        raise ValueError(f"{name}: {value!r:.60}, expected three numbers")
    return [_number(one, name) for one in values]
