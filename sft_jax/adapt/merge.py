"""Adapters merged into the kernels beside them, and the proof that this changed nothing but the form."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sft_jax.errors import RunError
from sft_jax.mesh import to_host
from sft_jax.nn.heads import LazyLogits
from sft_jax.nn.lora import SLOT, Adapter, column_norms, is_adapter, kernel_of, merged
from sft_jax.nn.template import Template

MOST = 1e-4  # of the difference of logits, relative to the largest of them
TOKENS = 256  # of each row, whose logits over a vocabulary are compared


def merge(plan: Mapping[str, Adapter], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The parameters of the model without adapters, float32; quantised kernels are merged into as they are held."""
    found = {path: np.asarray(array.astype(np.float32)[...]) for path, array in params.items() if not is_adapter(path)}
    for path, adapter in plan.items():
        kernel = kernel_of(path, found)
        a, b = (params[f"{path}/{SLOT}/{name}"] for name in "ab")
        whole = merged(found[kernel], a, b, adapter.scale)
        if adapter.dora:
            whole = whole * (params[f"{path}/{SLOT}/magnitude"] / column_norms(whole))
        found[kernel] = whole
    return found


def check(
    adapted: Template, params: Mapping[str, Any], plain: Template, whole: Mapping[str, Any], batch: Mapping[str, Any]
) -> None:
    """Raise RunError where a merged model and the adapted one differ on a batch, in float32 (C19)."""
    ours, theirs = to_host(_logits(adapted, params, batch)), to_host(_logits(plain, whole, batch))
    apart = float(np.abs(ours - theirs).max() / max(np.abs(ours).max(), 1e-6))
    if not apart <= MOST:  # nor where it is not a number
        raise RunError(
            f"export: the merged model's logits differ from those of the adapted one by {apart:.1e} of the largest, "
            f"expected at most {MOST}; nothing was written: use another checkpoint with --at"
        )


def _logits(template: Template, params: Mapping[str, Any], batch: Mapping[str, Any]) -> Float[Array, "..."]:
    def logits(params: Mapping[str, Any], batch: Mapping[str, Any]) -> Float[Array, "..."]:
        found = template.bind({path: array.astype(jnp.float32) for path, array in params.items()})(batch)
        return found.of(found.hidden[:, :TOKENS]) if isinstance(found, LazyLogits) else found

    return jax.jit(logits)(dict(params), dict(batch))
