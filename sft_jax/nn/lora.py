"""Adapters of low rank: a small module in the slot of a Linear or an Embed, and which layers get one.

Sources: LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732; DoRA, arXiv 2402.09353. Initial values are those of PEFT.
Letters: i inputs of a layer (rows of a table), o its outputs (size of a vector), r the rank.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sft_jax.config.adapter import AdapterSection
from sft_jax.errors import ConfigError, listing
from sft_jax.nn.layers import Embed, Linear, product
from sft_jax.nn.template import Normal, ones, param, zeros
from sft_jax.paths import matches, unmatched

SLOT = "adapter"  # the segment of a path below which everything belongs to an adapter
HEAD, WORDS = "head", "embed/word"


@dataclass(frozen=True)
class Adapter:
    """What one layer is given."""

    rank: int
    scale: float  # of the product
    dora: bool = False

    def is_like(self, other: "Adapter") -> bool:
        """Whether both are the same but for rounding."""
        return (self.rank, self.dora) == (other.rank, other.dora) and math.isclose(
            self.scale, other.scale, rel_tol=1e-6
        )


def planned(section: AdapterSection, layers: Mapping[str, Any], tied: bool) -> dict[str, Adapter]:
    """The layers that a section's patterns fit, of those below the head, and what each is given."""
    known = [path for path in layers if path.split("/")[0] != HEAD]
    problems = [unmatched(p, known, "layer") for p in section.match if not _fitting(p, known)]
    if problems:
        above = next((p for p in section.match if _fitting(p, [path for path in layers if path not in known])), None)
        hint = ["the head has no adapter; it is trained whole if it is new or on labels"] if above else []
        raise ConfigError(listing("adapter.match", [*problems, *hint]))
    found = [path for path in known if any(matches(pattern, path) for pattern in section.match)]
    shared = [path for path in found if tied and path == WORDS]
    if shared:
        raise ConfigError(
            f"adapter.match: {shared[0]} is read in two places, and an adapter would change one of them; match other "
            f"layers, or train it whole with adapter.also"
        )
    divided = section.rank if section.scaling == "rank" else section.rank**0.5
    return dict.fromkeys(found, Adapter(section.rank, section.alpha / divided, section.kind == "dora"))


def layers_of(module: nnx.Module) -> dict[str, Any]:
    """Every Linear and Embed of a module, by its path."""
    found = {"/".join(map(str, path)): layer for path, layer in nnx.iter_modules(module)}
    return {path: found[path] for path in sorted(found) if isinstance(found[path], Linear | Embed)}


def attach(layers: Mapping[str, Any], plan: Mapping[str, Adapter]) -> None:
    """Put adapters into the slots of these layers."""
    for path, adapter in plan.items():
        layers[path].adapter = nnx.data(LowRank(layers[path], adapter))


class LowRank(nnx.Module):
    """What a layer gives with `scale * a @ b` added to its kernel; of DoRA, every column of a learned size.

    The sum is never made of the whole: `x @ a @ b` are two thin products.
    """

    def __init__(self, layer: Linear | Embed, adapter: Adapter):
        linear = isinstance(layer, Linear)
        kernel = layer.kernel if isinstance(layer, Linear) else layer.embedding
        inputs, outputs = kernel.get_value().shape
        self.a = param((inputs, adapter.rank), kaiming if linear else zeros)
        self.b = param((adapter.rank, outputs), zeros if linear else Normal(1.0))
        self.magnitude = param((outputs,), ones) if adapter.dora else None  # begins as the kernel's: `adapt.begin`
        self.scale = adapter.scale

    def linear(self, x: Float[Array, "... i"], kernel: Float[Array, "i o"]) -> Float[Array, "... o"]:
        """Of a linear layer, its bias apart."""
        added = product(product(x, self.a[...]), self.b[...])
        return self._sized(product(x, kernel) + self.scale * added, kernel)

    def embed(self, ids: Int[Array, "..."], table: Float[Array, "i o"]) -> Float[Array, "... o"]:
        """Of a table of vectors."""
        added = product(jnp.take(self.a[...], ids, axis=0), self.b[...])
        return self._sized(jnp.take(table, ids, axis=0) + self.scale * added, table)

    def _sized(self, out: Float[Array, "... o"], kernel: Float[Array, "i o"]) -> Float[Array, "... o"]:
        if self.magnitude is None:
            return out
        # The norm is a constant of the backward pass, as in the paper (4.3): less memory, and as good.
        whole = jax.lax.stop_gradient(merged(kernel, self.a[...], self.b[...], self.scale))
        size = self.magnitude[...].astype(jnp.float32) / column_norms(whole)
        return out * size.astype(out.dtype)


def merged(kernel: Any, a: Any, b: Any, scale: float) -> Any:
    """`kernel + scale * a @ b` in float32, of arrays of the host or of a device."""
    return kernel[...].astype("float32") + scale * (a.astype("float32") @ b.astype("float32"))


def column_norms(kernel: Any) -> Any:
    """The Euclidean norm of each column [o], float32, of an array of the host or of a device; never quite 0."""
    return ((kernel.astype("float32") ** 2).sum(axis=0) ** 0.5).clip(1e-30)


def kaiming(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "i r"]:
    """Uniform within 1 / sqrt(inputs): Kaiming's with a = sqrt(5), as PEFT begins `a`."""
    bound = shape[-2] ** -0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def axes_of(plan: Mapping[str, Adapter], axes: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Logical axes of the adapters' parameters: those of the kernels beside them; the rank is whole everywhere."""
    found = {}
    for path, adapter in plan.items():
        inputs, outputs = axes[kernel_of(path, axes)]
        found |= {f"{path}/{SLOT}/a": (inputs, "."), f"{path}/{SLOT}/b": (".", outputs)}
        found |= {f"{path}/{SLOT}/magnitude": (outputs,)} if adapter.dora else {}
    return found


def kernel_of(path: str, known: Any) -> str:
    """The path of the matrix of a layer: `kernel`, or `embedding` of a table."""
    return f"{path}/kernel" if f"{path}/kernel" in known else f"{path}/embedding"


def is_adapter(path: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return f"/{SLOT}/" in path


def _fitting(pattern: str, paths: list[str]) -> bool:
    return any(matches(pattern, path) for path in paths)
