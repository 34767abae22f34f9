"""ResNet 18 to 152. Reference: `transformers.ResNetForImageClassification`; paper: arXiv 1512.03385.

Letters: r images (rows of the batch), h height, w width, c channels, e size of the features.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from sft_jax.errors import ModelError, did_you_mean
from sft_jax.models.family import Family, Head, check_activation, check_fields, check_images
from sft_jax.nn.convolution import BatchNorm, Conv, max_pool
from sft_jax.nn.heads import TokenHead, features_of
from sft_jax.nn.layers import ACTIVATIONS
from sft_jax.nn.random import Key, split
from sft_jax.nn.stack import Stack
from sft_jax.nn.template import Normal
from sft_jax.weights.table import Row, Table, batch_norm, conv, linear

LAYERS = {"basic": 2, "bottleneck": 3}  # kind of block -> its convolutions
NARROWER = 4  # how much a bottleneck is
MOST_BLOCKS = 256  # of a `config.json`, so that none makes a million


@dataclass(frozen=True)
class ResNetConfig:
    """What the arithmetic needs."""

    channels: int
    stem: int
    sizes: tuple[int, ...]  # channels after each stage
    depths: tuple[int, ...]  # blocks of each stage
    kind: str  # of all blocks
    activation: str
    halves_first: bool  # whether the first stage halves height and width, as all others do
    halves_early: bool  # whether the first convolution of a bottleneck does, and not the second

    def __post_init__(self):
        check_fields(self, {})
        check_activation(self.activation)
        if self.kind not in LAYERS:
            hint = did_you_mean(self.kind, LAYERS)
            raise ModelError(
                f"config.json: layer_type '{self.kind}' is not supported{hint} (known: {', '.join(LAYERS)})"
            )
        for name, numbers, least in (("hidden_sizes", self.sizes, NARROWER), ("depths", self.depths, 1)):
            if not numbers or not all(type(n) is int and least <= n < 2**31 for n in numbers):
                raise ModelError(f"config.json: {name} is {numbers!r:.60}, expected whole numbers of at least {least}")
        if len(self.sizes) != len(self.depths) or sum(self.depths) > MOST_BLOCKS:
            raise ModelError(
                f"config.json: {len(self.sizes)} hidden_sizes and depths {self.depths!r:.60}, expected as many of both "
                f"and at most {MOST_BLOCKS} blocks"
            )

    def blocks(self) -> list[tuple[int, int, int, int, int]]:
        """(stage, number in the stage, channels before, channels after, stride) of each block."""
        found, before = [], self.stem
        for stage, (size, depth) in enumerate(zip(self.sizes, self.depths, strict=True)):
            for number in range(depth):
                stride = 2 if number == 0 and (stage > 0 or self.halves_first) else 1
                found.append((stage, number, before, size, stride))
                before = size
        return found


def configure(config: dict[str, Any], dropout: float | None) -> ResNetConfig:
    """The network that a ResNet `config.json` describes; there is no dropout in it."""
    lists = {name: config[name] for name in ("hidden_sizes", "depths")}
    for name, given in lists.items():
        if not isinstance(given, list):
            raise ModelError(f"config.json: {name} is {given!r:.60}, expected a list of whole numbers")
    return ResNetConfig(
        channels=config.get("num_channels", 3),
        stem=config["embedding_size"],
        sizes=tuple(lists["hidden_sizes"]),
        depths=tuple(lists["depths"]),
        kind=config["layer_type"],
        activation=config.get("hidden_act", "relu"),
        halves_first=config.get("downsample_in_first_stage", False),
        halves_early=config.get("downsample_in_bottleneck", False),
    )


class ConvNorm(nnx.Module):
    """A convolution that keeps height and width but for its stride, and its norm."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int):
        init = Normal((2 / (outputs * size**2)) ** 0.5)  # He's, by outputs, as the reference begins
        self.conv = Conv(inputs, outputs, size, init, stride=stride, padding=size // 2)
        self.norm = BatchNorm(outputs)

    def __call__(self, x: Float[Array, "r h w c"], real: Bool[Array, " r"], key: Key | None) -> Float[Array, "r h w c"]:
        return self.norm(self.conv(x), real, key)


class Block(nnx.Module):
    """Two or three convolutions beside a shortcut, which is a convolution where the shape changes."""

    def __init__(self, config: ResNetConfig, before: int, after: int, stride: int):
        narrow, early = after // NARROWER, config.halves_early
        shapes = {
            "basic": ((before, after, 3, stride), (after, after, 3, 1)),
            "bottleneck": (
                (before, narrow, 1, stride if early else 1),
                (narrow, narrow, 3, 1 if early else stride),
                (narrow, after, 1, 1),
            ),
        }
        self.layers = nnx.List([ConvNorm(*shape) for shape in shapes[config.kind]])
        self.shortcut = ConvNorm(before, after, 1, stride) if stride != 1 or before != after else None
        self.activation = ACTIVATIONS[config.activation]

    def __call__(
        self, x: Float[Array, "r h w c"], real: Bool[Array, " r"], *, key: Key | None
    ) -> Float[Array, "r h w c"]:
        short = x if self.shortcut is None else self.shortcut(x, real, key)
        *first, last = self.layers
        for layer in first:
            x = jax.nn.relu(layer(x, real, key))  # whatever the activation, as the reference does
        return self.activation(last(x, real, key) + short)


class Stage(nnx.Module):
    """Blocks of one size; the first of them changes the shape."""

    def __init__(self, config: ResNetConfig, stage: int):
        shapes = [shape for of, _, *shape in config.blocks() if of == stage]
        self.blocks = Stack(len(shapes), lambda number: Block(config, *shapes[number]))

    def __call__(
        self, x: Float[Array, "r h w c"], real: Bool[Array, " r"], *, key: Key | None
    ) -> Float[Array, "r h w c"]:
        return self.blocks(x, real, key=key)


class ResNet(nnx.Module):
    """A convolution of seven pixels, stages of blocks, the mean of what is left of the image, and a head."""

    def __init__(self, config: ResNetConfig, outputs: int):
        size = config.sizes[-1]
        self.embed = ConvNorm(config.channels, config.stem, 7, 2)
        self.stages = Stack(len(config.depths), lambda stage: Stage(config, stage))
        self.head = TokenHead(size, outputs, Normal((3 * size) ** -0.5), 0.0)
        self.channels, self.activation = config.channels, ACTIVATIONS[config.activation]

    def __call__(self, batch: dict[str, Array], *, key: Key | None = None) -> Float[Array, "r 1 c"]:
        """Logits of each image."""
        return self.head(features_of(self, batch, key), batch, split(key, 2)[1]).astype(jnp.float32)

    def features(self, batch: dict[str, Array], key: Key | None) -> Float[Array, "r 1 e"]:
        """A vector for each image. With a key, norms whose statistics may move look at the whole batch."""
        check_images(batch["pixel_values"].shape, self.channels, 1)
        inside, _ = split(key, 2)
        real, x = batch["weight"][:, 0] > 0, batch["pixel_values"].astype(self.embed.conv.kernel[...].dtype)
        x = max_pool(self.activation(self.embed(x, real, inside)), 3, 2, 1)
        return self.stages(x, real, key=inside).mean(axis=(1, 2))[:, None]


def build(config: ResNetConfig, head: Head) -> nnx.Module:
    """The network with a linear layer on the mean of its last maps."""
    return ResNet(config, head.size)


def table(config: ResNetConfig, head: Head) -> Table:
    """All of ResNet; checkpoints with the names of torchvision are known by them."""
    rows, plain = _layer("embed", "resnet.embedder.embedder"), {"embed": ("conv1", "bn1")}
    for stage, number, before, after, stride in config.blocks():
        ours, theirs = f"stages/{stage}/blocks/{number}", f"resnet.encoder.stages.{stage}.layers.{number}"
        other = f"layer{stage + 1}.{number}"
        for place in range(LAYERS[config.kind]):
            rows += _layer(f"{ours}/layers/{place}", f"{theirs}.layer.{place}")
            plain[f"{ours}/layers/{place}"] = (f"{other}.conv{place + 1}", f"{other}.bn{place + 1}")
        if stride != 1 or before != after:
            rows += _layer(f"{ours}/shortcut", f"{theirs}.shortcut")
            plain[f"{ours}/shortcut"] = (f"{other}.downsample.0", f"{other}.downsample.1")
    norms = [row.theirs.removesuffix("running_mean") for row in rows if row.ours.endswith("/mean")]
    rows += linear("head/out", "classifier.1", "embed .", head=True)
    return Table(
        family="resnet",
        rows=rows,
        prefix="resnet.",
        ignore=("*.num_batches_tracked",),
        aliases={_torchvision(row, plain): row.theirs for row in rows},
        counters=tuple(f"{name}num_batches_tracked" for name in norms),
    )


def _layer(ours: str, theirs: str) -> tuple[Row, ...]:
    return (*conv(f"{ours}/conv", f"{theirs}.convolution"), *batch_norm(f"{ours}/norm", f"{theirs}.normalization"))


def _torchvision(row: Row, plain: dict[str, tuple[str, str]]) -> str:
    """The name that torchvision has for the tensor of a row; `plain` are its names of (convolution, norm) by path."""
    layer, kind, _ = row.ours.rsplit("/", 2)
    name = "fc" if layer == "head" else plain[layer][kind == "norm"]
    return f"{name}.{row.theirs.rpartition('.')[2]}"


FAMILY = Family(
    configure=configure,
    build=build,
    table=table,
    heads={"image_classification": "ForImageClassification"},
    classes={"resnet": "ResNet"},
    limits=lambda config: {},
    unread=("tie_word_embeddings", "vocab_size"),  # of texts
)
