"""Attention by kernels of accelerators, under the contract of `attend`, and which of them a model can take.

None holds scores for all pairs of tokens. `cudnn` is NVIDIA's, reached through jax: it is given where documents begin
and end and computes nothing between them, or, where layers see a window or the GPU is older than Hopper, what is
visible as a mask. `flash` is ours for NVIDIA's GPUs (`flash.py`): it has dropout, which the others lack. `splash` is
jax's own for TPUs; it is given the segments, and knows windows. Filler is zero, with zero gradient (C34), since its
outputs are put aside. They serve whole rows, so that a cache is read by `attend`. Of several devices each computes its
own rows and heads, by itself: XLA cannot divide a kernel.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from sft_jax.errors import ConfigError
from sft_jax.nn.attention import Visible, attend
from sft_jax.nn.devices import Over
from sft_jax.nn.random import Key

LONG = 128  # tokens of a row from which on `auto` leaves XLA: below, scores are few beside all that is moved
LONG_ON_TPU = 1024  # the same there: Splash computes what other documents of a row would see, too
BLOCKS = 512, 256, 128  # tokens that Splash takes at a time: the first that divides a row, filled up to the last
# Sizes of a head: for cuDNN those of all GPUs that it knows.
HEADS = {"cudnn": range(8, 129, 8), "flash": (16, 32, 64, 128), "splash": range(8, 257, 8)}
# Slots for documents in a row, for each number of a head, that cuDNN is told of: it keeps a number for every slot and
# token, which is four times the queries then. Planned packs have few; rows packed within the batch have one in eight
# tokens, so that those of more than 1,024 go by the mask where heads are of 64.
MOST_SLOTS = 2
RIGHT_SINCE = 0, 11, 2  # jax: before, it looked in the wrong places for documents in keys that heads share

ATTENDED = "attended"  # what a kernel gives and its gradient reads, to those who decide what is kept
PLATFORMS = {"cudnn": ("gpu", "cuda"), "flash": ("gpu", "cuda"), "splash": ("tpu",)}
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
    dtype: str
    over: Over | None = None  # None: one device


@dataclass(frozen=True)
class Choice:
    """A backend, from how many tokens of a row on, and over which devices."""

    name: str = "xla"
    least: int = 0
    over: Over | None = None


@dataclass(frozen=True)
class Part:
    """Which rows and heads a device has of all: its first ones, and how many heads there are."""

    row: Any = 0
    head: Any = 0
    heads: int = 0


XLA = Choice()
AUTO = {"cudnn": LONG, "flash": LONG, "splash": LONG_ON_TPU}  # what `auto` tries in turn, of rows this long


def choose(asked: str, hardware: Hardware, needs: Needs) -> Choice:
    """The backend of a module; `auto` takes what the machine is best at where it can, by name it must."""
    if asked == "auto":
        able = (name for name in AUTO if not obstacle(name, hardware, needs))
        return next((Choice(name, AUTO[name], hardware.over) for name in able), XLA)
    why = obstacle(asked, hardware, needs)
    if why:
        raise ConfigError(f"train.attention: {asked} {why}; set it to auto or xla")
    return Choice(asked, over=None if asked == "xla" else hardware.over)


def obstacle(name: str, hardware: Hardware, needs: Needs) -> str | None:
    """Why a backend cannot do what is needed; None where it can."""
    if name == "xla":
        return None
    if hardware.platform not in PLATFORMS[name]:
        return f"does not run on {hardware.platform}"
    if name == "flash" and importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return "is written for Triton, which this jax has no more"
    if needs.dropout and name != "flash":
        return f"draws no dropout, and the model's rate is {needs.dropout:g} (model.dropout=0 would do)"
    if needs.softcap is not None and name != "splash":
        return "does not bound scores, as this model does"
    if name != "splash" and hardware.dtype not in ("bfloat16", "float16"):
        return f"does not compute in {hardware.dtype} (train.compute_dtype=bfloat16 would do)"
    if needs.head_size not in HEADS[name]:
        return f"has no heads of size {needs.head_size}"
    if needs.window and name == "flash":
        return "sees whole documents, and layers of this model a window of them"
    return None


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
    visible: Visible,
    *,
    causal: bool,
    scale: float | None = None,
    softcap: float | None = None,
    rate: float = 0.0,
    key: Key | None = None,
) -> Float[Array, "r q h d"]:
    """`attend` by a backend; `causal` says that documents stand in order and tokens see none that come later."""
    length = queries.shape[1]
    # Documents are seen in a mask, but not behind a window.
    unknown = visible.lengths is None and (backend.name == "flash" or visible.window is not None)
    if backend.name == "xla" or length != keys.shape[1] or length < backend.least or unknown:
        return attend(queries, keys, values, visible.mask, scale=scale, softcap=softcap, rate=rate, key=key)
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    how = {"causal": causal, "scale": scale, "softcap": softcap, "rate": rate}
    mixed = _divided(partial(KERNELS[backend.name], **how), backend.over, queries, keys, values, visible, key)
    # What a query that sees nothing is given is no number to rely on, and must not send back a gradient.
    if visible.lengths is None:
        real = visible.mask.any(axis=-1)
    else:
        real = jnp.arange(length) < visible.lengths.sum(axis=-1, keepdims=True)
    return jnp.where(real[:, :, None, None], mixed, 0)


def _divided(
    kernel: Kernel, over: Over | None, q: Array, k: Array, v: Array, visible: Visible, key: Key | None
) -> Array:
    """A kernel on each device's own rows and heads; an axis that does not divide them has all of them on each."""
    heads = q.shape[2]
    if over is None:
        return kernel(q, k, v, visible, key=key, part=Part(heads=heads))
    by_row, by_head = over.of_rows(q.shape[0]), over.of_heads(k.shape[2])

    def own(q: Array, k: Array, v: Array, visible: Visible, key: Key | None) -> Array:
        row = jax.lax.axis_index(by_row) * q.shape[0] if by_row else 0
        head = jax.lax.axis_index(by_head) * q.shape[2] if by_head else 0
        return kernel(q, k, v, visible, key=key, part=Part(row, head, heads))

    # Without axes where there is one row for all, or none; a mesh axis that is not named holds copies.
    mask = P(by_row) if visible.mask.shape[0] > 1 else P()
    seen: Any = Visible(mask, None if visible.lengths is None else P(by_row), visible.window)  # type: ignore[arg-type]
    tokens = P(by_row, None, by_head)
    given = (tokens, tokens, tokens, seen, P())
    return jax.shard_map(own, mesh=over.mesh, in_specs=given, out_specs=tokens, check_vma=False)(q, k, v, visible, key)


def segments_of(visible: Bool[Array, "r t t"]) -> Int[Array, "r t"]:
    """The segments behind a mask: a document is called by the place of its first token, counted from 1; filler is 0."""
    return jnp.where(visible.any(axis=-1), jnp.argmax(visible, axis=-1) + 1, 0).astype(jnp.int32)


def _padded(multiple: int, arrays: tuple[Array, ...], mask: Array) -> tuple[Array, ...]:
    """The tokens of arrays [r, t, ., .] and of a mask [r, t, t], with filler up to a multiple."""
    more = -mask.shape[1] % multiple
    wide = (jnp.pad(array, ((0, 0), (0, more), (0, 0), (0, 0))) for array in arrays)
    return (*wide, jnp.pad(mask, ((0, 0), (0, more), (0, more))))


def _flash(q: Array, k: Array, v: Array, visible: Visible, *, softcap: None, **how: Any) -> Array:
    from sft_jax.nn import flash

    assert visible.lengths is not None
    return flash.attend(q, k, v, visible.lengths, **how)


def _cudnn(q: Array, k: Array, v: Array, visible: Visible, *, causal: bool, scale: float, **_: Any) -> Array:
    from jax._src.cudnn import fused_attention_stablehlo as fused

    lengths, asked = visible.lengths, q.shape[1]
    q, k, v, mask = _padded(2, (q, k, v), visible.mask)  # gradients are computed of even rows alone
    misplaced = jax.__version_info__ < RIGHT_SINCE and k.shape[2] != q.shape[2]
    unfit = lengths is None or lengths.shape[1] > MOST_SLOTS * q.shape[3] or misplaced or visible.window is not None
    if unfit or not fused.check_compute_capability("9.0"):
        mixed = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale, implementation="cudnn")
        return mixed[:, :asked]
    assert lengths is not None
    # Filler is one document more: what cuDNN does not compute it does not write, gradients neither.
    filler = q.shape[1] - lengths.sum(axis=-1, keepdims=True)
    sizes = jnp.concatenate([lengths, filler], axis=-1)
    begins = jnp.where(sizes > 0, jnp.cumsum(sizes, axis=-1) - sizes, -1)
    sizes, begins = jnp.where(sizes > 0, sizes, -1), jnp.pad(begins, ((0, 0), (0, 1)), constant_values=-1)
    places: dict[str, Any] = {"q_seqlen": sizes, "kv_seqlen": sizes, "q_offsets": begins, "kv_offsets": begins}
    kind = fused.MaskType.PADDING_CAUSAL if causal else fused.MaskType.PADDING
    mixed: Any = fused.dot_product_attention(q, k, v, **places, scale=scale, mask_type=kind)
    return mixed[:, :asked]


def _splash(
    q: Array, k: Array, v: Array, visible: Visible, *, causal: bool, scale: float, softcap: Any, **_: Any
) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    asked = q.shape[1]
    q, k, v, seen = _padded(BLOCKS[-1], (q, k, v), visible.mask)
    rows, length, heads = q.shape[:3]
    if visible.lengths is None:
        segments = jnp.broadcast_to(segments_of(seen), (rows, length))
    else:
        places, ends = jnp.arange(length), jnp.cumsum(visible.lengths, axis=-1)
        segments = (places[None, None] < ends[..., None]).sum(axis=1, dtype=jnp.int32)  # 0 is filler
    mask: Any = (masks.CausalMask if causal else masks.FullMask)((length, length))
    if visible.window is not None:
        mask = masks.LocalMask((length, length), (visible.window - 1, 0), 0)
    by = next(size for size in BLOCKS if length % size == 0)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=ATTENDED,
        block_sizes=splash.BlockSizes(by, by, by, by, by, by, by, by),  # forward, and both gradients
        interpret=jax.default_backend() == "cpu",
    )
    q, k, v = (array.swapaxes(1, 2) for array in (q * jnp.asarray(scale, q.dtype), k, v))
    mixed: Any = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments, segments))
    return mixed.swapaxes(1, 2)[:, :asked]


KERNELS: dict[str, Kernel] = {"cudnn": _cudnn, "flash": _flash, "splash": _splash}
