"""What tests of images share: pictures of a kind that can be learned, tiny checkpoints that read them, a small run."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from conftest import write_model  # noqa: F401  (the environment has to be in order before jax is imported)
from PIL import Image

from sft_jax.models.family import Head, build_model
from sft_jax.weights.files import write_checkpoint
from sft_jax.weights.table import save

LABELS = ("blue", "green", "red")
RESNET = {
    "model_type": "resnet", "num_channels": 3, "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1],
    "layer_type": "basic", "hidden_act": "relu", "downsample_in_first_stage": False,
}  # fmt: skip
VIT = {
    "model_type": "vit", "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 20,
    "image_size": 16, "patch_size": 8, "num_channels": 3, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2,
}  # fmt: skip
SQUARE = {
    "image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}, "resample": 2,
    "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7],
}  # fmt: skip


def noise(seed: int, height: int, width: int) -> np.ndarray:
    """An image of grey levels drawn at random, uint8 [h, w, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(pixels: np.ndarray, form: str = "PNG", **options: object) -> bytes:
    """An array as an encoded image."""
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, form, **options)
    return held.getvalue()


def coloured(count: int, seed: int = 0) -> list[tuple[str, np.ndarray]]:
    """(label, image) pairs: noise of odd sizes, brighter in the channel that the label names."""
    draw = np.random.default_rng(seed)
    found = []
    for number in range(count):
        label = LABELS[number % len(LABELS)]
        pixels = draw.integers(0, 128, (*draw.integers(9, 31, 2), 3), dtype=np.uint8)
        pixels[..., 2 - LABELS.index(label)] += 127
        found.append((label, pixels))
    return found


def write_pictures(home: Path, count: int, seed: int = 0) -> Path:
    """A folder for each label with PNG and JPEG files."""
    for number, (label, pixels) in enumerate(coloured(count, seed)):
        (home / label).mkdir(parents=True, exist_ok=True)
        form = ("PNG", "JPEG")[number % 2]
        (home / label / f"{number:03}.{form.lower()}").write_bytes(encode(pixels, form))
    return home


def write_vision(directory: Path, config: dict, processor: dict = SQUARE, labels: Sequence[str] = ()) -> Path:
    """A random checkpoint with a processor; with labels it holds a head as well."""
    model = build_model(config, Head("image_classification", len(labels) or 2), "tiny")
    params = model.template.initial(jax.random.key(0), model.template.keys)
    tensors = save(model.table, {path: np.asarray(array) for path, array in params.items()})
    kept = {name: tensor for name, tensor in tensors.items() if labels or not name.startswith("classifier")}
    named = {"id2label": {str(i): label for i, label in enumerate(labels)}} if labels else {}
    write_checkpoint(directory, {**config, **named}, kept)
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    return directory


def settings(home: Path, model: Path, images: Path, *more: str) -> list[str]:
    """The settings of a small run on folders of pictures."""
    return [
        f"run.dir={home / 'run'}",
        f"model.source={model}",
        "task.kind=image_classification",
        "data.source.kind=files",
        *(f"data.source.{split}={images / split}" for split in ("train", "validation", "test")),
        "train.batch_size=6",
        "train.epochs=2",
        "train.log_every=1",
        "optim.lr=1e-2",
        "eval.batch_size=8",
        "mesh.data=1",
        *more,
    ]
