"""What a run with adapters begins with: which parameters stand still, and the numbers that depend on loaded weights."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sft_jax.adapt.peft import WORD_TABLE
from sft_jax.config.adapter import AdapterSection
from sft_jax.errors import ConfigError
from sft_jax.nn.heads import ON_VOCABULARY
from sft_jax.nn.lora import HEAD, SLOT, Adapter, column_norms, is_adapter, kernel_of
from sft_jax.nn.quantised import Kind, quantise
from sft_jax.paths import select


def standing_still(
    section: AdapterSection | None, paths: Sequence[str], plan: Iterable[str], initialised: Iterable[str], head: str
) -> frozenset[str]:
    """The paths that are frozen beside adapters: all but those, what is new, a head on labels, and `adapter.also`.

    `paths` are all of the model's, `plan` the layers with an adapter, `initialised` those that no checkpoint holds.
    """
    if section is None:
        return frozenset()
    also = select(section.also, [path for path in paths if not is_adapter(path)], "adapter.also")
    both = [path for path in sorted(also) if path.rpartition("/")[0] in {*plan}]
    if both:
        raise ConfigError(f"adapter.also: {both[0]} is of a layer that has an adapter; leave it out of one of them")
    if head == "seq2seq" and WORD_TABLE in also:
        raise ConfigError(f"adapter.also: {WORD_TABLE} is read by both sides, which an adapter directory cannot say")
    new = {*initialised} if head in ON_VOCABULARY else {*initialised, *(p for p in paths if p.startswith(f"{HEAD}/"))}
    return frozenset(path for path in paths if not is_adapter(path) and path not in new and path not in also)


def few_bits(section: AdapterSection | None, plan: Iterable[str], known: Collection[str]) -> dict[str, Kind]:
    """The kernels, of those that are known, that are held in few bits, and how; tables of vectors are not."""
    kind = section.base if section else "same"
    return {} if kind == "same" else {f"{path}/kernel": kind for path in plan if f"{path}/kernel" in known}


def begin(section: AdapterSection, plan: Mapping[str, Adapter], loaded: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The loaded arrays with kernels under adapters as `adapter.base` has them, and the sizes that DoRA begins with.

    These are the norms of the columns as they are held, so that a new adapter changes nothing.
    """
    arrays: dict[str, Any] = dict(loaded)
    arrays |= {path: quantise(loaded[path], kind) for path, kind in few_bits(section, plan, loaded).items()}
    for path, adapter in plan.items():
        kernel = kernel_of(path, loaded)
        if adapter.dora:
            arrays.setdefault(f"{path}/{SLOT}/magnitude", column_norms(arrays[kernel][...]))
    return arrays
