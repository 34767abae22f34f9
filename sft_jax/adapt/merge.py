"""Adapters merged into the kernels beside them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sft_jax.nn.lora import SLOT, Adapter, column_norms, is_adapter, kernel_of, merged


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
