"""What the parity tests of images share: random references with random statistics, and documents that are images."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch_reference import LABELS, Pair, paired, randomised, torch

from sft_jax.data.batch import Batch, Encoded, Shape, collate

KIND = "image_classification"
RESNET = {"embedding_size": 10, "hidden_sizes": [12, 20, 28], "depths": [2, 1, 2], "layer_type": "bottleneck"}
VIT = {
    "hidden_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "intermediate_size": 37,
    "image_size": 21,
    "patch_size": 7,
}
DINOV2 = {**VIT, "mlp_ratio": 3}
# Name -> (family, what its configuration says). Sizes are odd on purpose: no two of them agree by chance.
CASES: dict[str, tuple[str, dict]] = {
    "resnet": ("resnet", RESNET),
    "resnet-basic": (
        "resnet",
        {
            **RESNET,
            "hidden_sizes": [10, 22],
            "depths": [2, 1],
            "layer_type": "basic",
            "downsample_in_first_stage": True,
        },
    ),
    "resnet-early-gelu-grey": (
        "resnet",
        {
            **RESNET,
            "hidden_sizes": [10, 22],
            "depths": [1, 2],
            "downsample_in_bottleneck": True,
            "hidden_act": "gelu",
            "num_channels": 1,
        },
    ),
    "vit": ("vit", VIT),
    "vit-no-biases-relu-rest": (
        "vit",
        {**VIT, "num_hidden_layers": 1, "qkv_bias": False, "hidden_act": "relu", "image_size": 23, "num_channels": 1},
    ),
    "dinov2": ("dinov2", DINOV2),
    "dinov2-swiglu-no-mask": (
        "dinov2",
        {
            **DINOV2,
            "num_hidden_layers": 2,
            "image_size": 23,
            "patch_size": 5,
            "use_swiglu_ffn": True,
            "use_mask_token": False,
            "layerscale_value": 0.1,
            "layer_norm_eps": 1e-2,
        },
    ),
}
DEEP = ("resnet", "vit", "dinov2")  # a case of each family
SIDE = 37  # pixels of images for what knows no size of its own


@dataclass(frozen=True)
class Pixels:
    """Images by number, ready made."""

    images: np.ndarray  # [documents, h, w, c]

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.images.tobytes()).hexdigest()

    def __call__(self, documents: np.ndarray, visits: np.ndarray | None) -> np.ndarray:
        return self.images[documents]


def reference_model(name: str, seed: int = 0) -> "torch.nn.Module":
    """A reference of a case, every number drawn at random, running statistics too."""
    family, settings = CASES[name]
    torch.manual_seed(seed)
    return with_statistics(randomised(family, {**settings, "num_labels": LABELS}, seed, 0.1, KIND))


def with_statistics(reference: "torch.nn.Module", seed: int = 1) -> "torch.nn.Module":
    """The same, its running means around 0 and variances around 1 drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in reference.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
        if name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return reference


def pair_of(name: str, directory: Path) -> Pair:
    """A reference of a case and ours, loaded from where it was saved."""
    return paired(reference_model(name), directory)


def images(reference: "torch.nn.Module", count: int, size: tuple[int, int] | None = None, seed: int = 0) -> Encoded:
    """Documents that are random images, of the size that the reference is made for unless said otherwise."""
    config, draw = reference.config, np.random.default_rng(seed)
    side = getattr(config, "image_size", SIDE)
    shape = (count, *(size or (side, side)), config.num_channels)
    labels = draw.integers(0, config.num_labels, size=count).astype(np.int32)
    # Brighter for a larger label, so that there is something to learn.
    pixels = (draw.normal(size=shape) + labels[:, None, None, None] / 2).astype(np.float32)
    return Encoded({}, np.arange(count + 1), {"label": labels}, lazy={"pixel_values": Pixels(pixels)})


def one_a_row(encoded: Encoded) -> Batch:
    """Every image in a row of its own, and a row of filler at the end."""
    return collate(encoded, [[i] for i in range(len(encoded))], Shape(len(encoded) + 1, 1, 1))


def torch_batch(encoded: Encoded, chosen: np.ndarray | None = None) -> dict[str, Any]:
    """The arguments of the reference: images, channels first, and labels."""
    chosen = np.arange(len(encoded)) if chosen is None else chosen
    pixels = torch.from_numpy(encoded.lazy["pixel_values"](chosen, None)).permute(0, 3, 1, 2)
    return {"pixel_values": pixels, "labels": torch.from_numpy(encoded.documents["label"][chosen].astype(np.int64))}


def torch_logits(reference: "torch.nn.Module", encoded: Encoded) -> np.ndarray:
    """Logits of the reference; positions of images of another size are interpolated."""
    more = {"interpolate_pos_encoding": True} if type(reference).__name__.startswith("ViT") else {}
    with torch.no_grad():
        return reference(**torch_batch(encoded), **more).logits.numpy()
