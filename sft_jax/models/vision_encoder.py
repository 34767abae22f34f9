"""The pre-norm transformer on patches of an image that ViT and DINOv2 share. Source: arXiv 2010.11929.

Letters: r images (rows of the batch), h height, w width, t tokens (the class token and the patches), e size of the
hidden states, f size of the features.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sft_jax.errors import ModelError
from sft_jax.models.encoder import Attention, Mlp
from sft_jax.models.family import check_activation, check_fields, check_images, refuse, whole
from sft_jax.nn.attention import Visible
from sft_jax.nn.convolution import Conv
from sft_jax.nn.heads import TokenHead, features_of
from sft_jax.nn.layers import LayerNorm, Linear, dropout, gated
from sft_jax.nn.random import Key, split
from sft_jax.nn.stack import Stack
from sft_jax.nn.template import Constant, Normal, param, stat, zeros

# The largest numbers that are taken from a `config.json`; others are below 2^31.
RATES = ("embed_dropout", "dropout", "attention_dropout", "drop_path")
MOST = {"num_layers": 256, "image_size": 2**15, **dict.fromkeys(RATES, 1)}


@dataclass(frozen=True)
class VisionConfig:
    """What the arithmetic needs; sizes come from the checkpoint's `config.json`."""

    size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    image_size: int  # of the table of positions
    patch_size: int
    channels: int
    activation: str
    norm_eps: float
    init_std: float
    embed_dropout: float
    dropout: float  # of the branches
    attention_dropout: float
    bias: bool  # of queries, keys and values
    scaled: bool = False  # whether the branches have DINOv2's scales
    layer_scale: float = 1.0  # what these begin with
    gated: bool = False  # SwiGLU in the place of the MLP
    drop_path: float = 0.0  # how often a branch is left out in training
    mask_token: bool = False  # a vector of pretraining, kept for what reads an export
    mean_patch: bool = False  # whether the mean of the patches is a feature beside the class token

    def __post_init__(self):
        check_fields(self, MOST)
        check_activation(self.activation)
        if self.size % self.num_heads:
            raise ModelError(f"config.json: hidden size {self.size} is not divisible by {self.num_heads} heads")
        if self.patch_size > self.image_size:
            raise ModelError(f"config.json: no patch of {self.patch_size} pixels is in an image of {self.image_size}")

    @property
    def side(self) -> int:
        """Patches along each side of the table of positions."""
        return self.image_size // self.patch_size


def check_heads(config: dict[str, Any]) -> None:
    """Heads of another size than their share of the hidden states are not computed."""
    share = whole(config, "hidden_size") // whole(config, "num_attention_heads")
    refuse(config, config["model_type"], {"head_dim": share})


def square(config: dict[str, Any], key: str) -> int:
    """A size of a `config.json` that may be given for height and width; both must be the same."""
    value = config[key]
    sides = value if isinstance(value, list) and value else [value]
    if any(type(side) is not int or side != sides[0] for side in sides):
        raise ModelError(f"config.json: {key} is {value!r:.60}, expected a whole number: only squares are supported")
    return whole({key: sides[0]}, key)


class Embeddings(nnx.Module):
    """Patches behind a class token, with positions; those of images of another size are interpolated."""

    def __init__(self, config: VisionConfig):
        init, size, patch = Normal(config.init_std), config.size, config.patch_size
        self.patch = Conv(config.channels, size, patch, init, stride=patch, bias=True)
        self.cls = param((1, 1, size), init)
        self.position = param((1, config.side**2 + 1, size), init)
        self.mask = stat((1, size), zeros) if config.mask_token else None
        self.channels, self.side, self.rate = config.channels, config.side, config.embed_dropout

    def __call__(self, pixels: Float[Array, "r h w c"], key: Key | None) -> Float[Array, "r t e"]:
        check_images(pixels.shape, self.channels, self.patch.size)
        found = self.patch(pixels.astype(self.patch.kernel[...].dtype))
        count, rows, columns, size = found.shape
        cls = jnp.broadcast_to(self.cls[...], (count, 1, size))
        x = jnp.concatenate([cls, found.reshape(count, -1, size)], axis=1)
        return dropout(x + self._positions(rows, columns), self.rate, key)

    def _positions(self, rows: int, columns: int) -> Float[Array, "1 t e"]:
        table = self.position[...]
        if (rows, columns) == (self.side, self.side):
            return table
        grid = table[0, 1:].reshape(self.side, self.side, -1).astype(jnp.float32)
        between = jnp.einsum("ia,jb,abe->ije", bicubic(self.side, rows), bicubic(self.side, columns), grid)
        return jnp.concatenate([table[:, :1], between.reshape(1, rows * columns, -1).astype(table.dtype)], axis=1)


def bicubic(old: int, new: int) -> np.ndarray:
    """What each of `new` points takes of each of `old` ones: [new, old], rows that sum to 1.

    As torch's bicubic interpolation without aligned corners: Keys' kernel with a = -0.75, ends repeated.
    """
    places = (np.arange(new) + 0.5) * (old / new) - 0.5
    nearest, a = np.floor(places).astype(int), -0.75
    taken = np.zeros((new, old))
    for offset in (-1, 0, 1, 2):
        far = np.abs(places - nearest - offset)
        near = ((a + 2) * far - (a + 3)) * far**2 + 1
        weight = np.where(far <= 1, near, ((far - 5) * far + 8) * far * a - 4 * a)
        np.add.at(taken, (np.arange(new), np.clip(nearest + offset, 0, old - 1)), weight)
    return taken.astype(np.float32)


class Scale(nnx.Module):
    """A factor for each channel. Source: LayerScale, arXiv 2103.17239."""

    def __init__(self, size: int, begin: float):
        self.scale = param((size,), Constant(begin))

    def __call__(self, x: Float[Array, "r t e"]) -> Float[Array, "r t e"]:
        return x * self.scale[...]


class Gated(nnx.Module):
    """SwiGLU: a linear layer times the SiLU of another. Source: arXiv 2002.05202."""

    def __init__(self, size: int, inner: int, init: Normal):
        self.gate, self.up = Linear(size, inner, init), Linear(size, inner, init)
        self.down = Linear(inner, size, init)

    def __call__(self, x: Float[Array, "r t e"]) -> Float[Array, "r t e"]:
        return self.down(gated(jax.nn.silu, self.gate(x), self.up(x)))


class Block(nnx.Module):
    """Attention and MLP, each on normed hidden states and added to them."""

    def __init__(self, config: VisionConfig):
        init, size, scale = Normal(config.init_std), config.size, config.layer_scale
        self.attn_norm, self.mlp_norm = LayerNorm(size, config.norm_eps), LayerNorm(size, config.norm_eps)
        self.attn = Attention(size, config.num_heads, init, config.attention_dropout, bias=config.bias)
        inner = config.mlp_size
        self.mlp = Gated(size, inner, init) if config.gated else Mlp(size, inner, init, config.activation)
        self.attn_scale, self.mlp_scale = (Scale(size, scale) if config.scaled else None for _ in range(2))
        self.rate, self.path_rate = config.dropout, config.drop_path

    def __call__(self, x: Float[Array, "r t e"], visible: Visible, *, key: Key | None) -> Float[Array, "r t e"]:
        inside, after_attn, after_mlp = split(key, 3)
        x = x + self._branch(self.attn(self.attn_norm(x), visible, inside), self.attn_scale, after_attn)
        return x + self._branch(self.mlp(self.mlp_norm(x)), self.mlp_scale, after_mlp)

    def _branch(self, x: Float[Array, "r t e"], scale: Scale | None, key: Key | None) -> Float[Array, "r t e"]:
        inside, path = split(key, 2)
        x = dropout(x if scale is None else scale(x), self.rate, inside)
        return drop_path(x, self.path_rate, path)


def drop_path(x: Float[Array, "r t e"], rate: float, key: Key | None) -> Float[Array, "r t e"]:
    """Leaves a branch out for a share `rate` of the rows and scales it up for the others. Source: arXiv 1603.09382."""
    return x if key is None or rate == 0 else x * dropout(jnp.ones((x.shape[0], 1, 1), x.dtype), rate, key)


class VisionEncoder(nnx.Module):
    """Embeddings, blocks, a norm and a head."""

    def __init__(self, config: VisionConfig, outputs: int):
        init, size = Normal(config.init_std), config.size
        self.embed = Embeddings(config)
        self.blocks = Stack(config.num_layers, lambda number: Block(config))
        self.norm = LayerNorm(size, config.norm_eps)
        self.head = TokenHead(2 * size if config.mean_patch else size, outputs, init, 0.0)
        self.mean_patch = config.mean_patch

    def __call__(self, batch: dict[str, Array], *, key: Key | None = None) -> Float[Array, "r 1 c"]:
        """Logits of each image."""
        return self.head(features_of(self, batch, key), batch, split(key, 3)[2]).astype(jnp.float32)

    def features(self, batch: dict[str, Array], key: Key | None) -> Float[Array, "r 1 f"]:
        """A vector for each image: the class token, and the mean of the patches where the family has it."""
        embed_key, blocks_key, _ = split(key, 3)
        x = self.embed(batch["pixel_values"], embed_key)
        rows, tokens, _ = x.shape
        visible = Visible(jnp.ones((1, tokens, tokens), bool), jnp.full((rows, 1), tokens, jnp.int32))
        x = self.norm(self.blocks(x, visible, key=blocks_key))
        parts = [x[:, :1], x[:, 1:].mean(axis=1, keepdims=True)] if self.mean_patch else [x[:, :1]]
        return jnp.concatenate(parts, axis=-1)
