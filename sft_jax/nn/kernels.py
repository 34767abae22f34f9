"""Attention by kernels of accelerators, under the contract of `attend`, and which of them a model can take.

None holds scores for all pairs of tokens. `cudnn` is NVIDIA's, reached through jax and given what is visible as a mask;
`splash` is jax's own for TPUs and is given the segments. Filler is zero, with zero gradient (C34), since its outputs
are put aside. They serve whole rows, so that a cache is read by `attend`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sft_jax.errors import ConfigError
from sft_jax.nn.attention import attend
from sft_jax.nn.random import Key

LONG = 512  # tokens of a row from which on `auto` leaves XLA: below, scores are small beside the other products
BLOCK = 128  # tokens that Splash takes at a time
HEADS_OF = 8, 128  # a head's size must be a multiple of the one and at most the other for cuDNN on all GPUs it knows
SPLASH_HEADS_OF = 128

Kernel = Callable[..., Float[Array, "r t h d"]]


@dataclass(frozen=True)
class Needs:
    """What a module asks of its attention."""

    head_size: int
    dropout: float = 0.0
    softcap: float | None = None
    window: bool = False  # some layers see the last tokens alone


@dataclass(frozen=True)
class Hardware:
    """What there is to compute with."""

    platform: str  # as jax calls it
    devices: int
    dtype: str


@dataclass(frozen=True)
class Choice:
    """A backend, and from how many tokens of a row on."""

    name: str = "xla"
    least: int = 0


XLA = Choice()


def choose(asked: str, hardware: Hardware, needs: Needs) -> Choice:
    """The backend of a module; `auto` takes what the machine is best at where it can, by name it must."""
    if asked == "auto":
        return XLA if obstacle("cudnn", hardware, needs) else Choice("cudnn", LONG)
    why = obstacle(asked, hardware, needs)
    if why:
        raise ConfigError(f"train.attention: {asked} {why}; set it to auto or xla")
    return Choice(asked)


def obstacle(name: str, hardware: Hardware, needs: Needs) -> str | None:
    """Why a backend cannot do what is needed; None where it can."""
    if name == "xla":
        return None
    multiple, most = HEADS_OF
    if hardware.platform not in {"cudnn": ("gpu", "cuda"), "splash": ("tpu",)}[name]:
        return f"does not run on {hardware.platform}"
    if needs.dropout:
        return f"draws no dropout, and the model's rate is {needs.dropout:g} (model.dropout=0 would do)"
    if needs.softcap is not None and name != "splash":
        return "does not bound scores, as this model does"
    if name == "cudnn":
        if hardware.dtype not in ("bfloat16", "float16"):
            return f"does not compute in {hardware.dtype} (train.compute_dtype=bfloat16 would do)"
        fits = needs.head_size % multiple == 0 and needs.head_size <= most
        return None if fits else f"has no heads of size {needs.head_size}"
    if needs.window:
        return "sees whole documents, and layers of this model a window of them"
    if needs.head_size % SPLASH_HEADS_OF:
        return f"has no heads of size {needs.head_size}"
    return "keeps to one device" if hardware.devices > 1 else None


def use(module: nnx.Module, asked: str, hardware: Hardware, where: str) -> None:
    """Let every self-attention of a module, which may not be bound yet, compute by the backend that is asked for."""
    found = [node for _, node in nnx.iter_graph(module) if isinstance(getattr(node, "backend", None), Choice)]
    if not found and asked not in ("auto", "xla"):
        raise ConfigError(f"train.attention: {where} has no attention that {asked} could compute; set it to auto")
    for node in found:
        node.backend = choose(asked, hardware, node.needs)


def attend_by(
    backend: Choice,
    queries: Float[Array, "r q h d"],
    keys: Float[Array, "r k g d"],
    values: Float[Array, "r k g d"],
    visible: Bool[Array, "#r q k"],
    *,
    causal: bool,
    scale: float | None = None,
    softcap: float | None = None,
    rate: float = 0.0,
    key: Key | None = None,
) -> Float[Array, "r q h d"]:
    """`attend` by a backend; `causal` says that documents stand in order and tokens see none that come later."""
    length = queries.shape[1]
    if backend.name == "xla" or length != keys.shape[1] or length < backend.least:
        return attend(queries, keys, values, visible, scale=scale, softcap=softcap, rate=rate, key=key)
    kernel, multiple = KERNELS[backend.name]
    more = -length % multiple
    q, k, v = (jnp.pad(array, ((0, 0), (0, more), (0, 0), (0, 0))) for array in (queries, keys, values))
    seen = jnp.pad(visible, ((0, 0), (0, more), (0, more)))
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    mixed = kernel(q, k, v, seen, causal=causal, scale=scale, softcap=softcap)[:, :length]
    # What a query that sees nothing is given is no number to rely on, and must not send back a gradient.
    return jnp.where(visible.any(axis=-1)[:, :, None, None], mixed, 0)


def segments_of(visible: Bool[Array, "r t t"]) -> Int[Array, "r t"]:
    """The segments behind a mask: a document is called by the place of its first token, counted from 1; filler is 0."""
    return jnp.where(visible.any(axis=-1), jnp.argmax(visible, axis=-1) + 1, 0).astype(jnp.int32)


def _cudnn(q: Array, k: Array, v: Array, visible: Array, *, causal: bool, scale: float, softcap: None) -> Array:
    return jax.nn.dot_product_attention(q, k, v, mask=visible[:, None], scale=scale, implementation="cudnn")


def _splash(q: Array, k: Array, v: Array, visible: Array, *, causal: bool, scale: float, softcap: Any) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads = q.shape[1:3]
    k, v = (jnp.repeat(array, heads // k.shape[2], axis=2) for array in (k, v))
    segments = jnp.broadcast_to(segments_of(visible), q.shape[:2])
    mask = (masks.CausalMask if causal else masks.FullMask)((length, length))
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        interpret=jax.default_backend() == "cpu",
    )
    q, k, v = (array.swapaxes(1, 2) for array in (q * jnp.asarray(scale, q.dtype), k, v))
    mixed: Any = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments, segments))
    return mixed.swapaxes(1, 2)


# Name -> kernel, and what the tokens of a row must be a multiple of.
KERNELS: dict[str, tuple[Kernel, int]] = {"cudnn": (_cudnn, 2), "splash": (_splash, BLOCK)}
