"""How the layers of a run are held: each for itself, or those that are alike as one array, which are scanned over.

What is asked for by path (frozen, held back, penalised, loaded) must be the same of all layers in an array; rates and
decays need not be. The state of a run that was saved in one way goes on in the other.
"""

from collections.abc import Collection, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sft_jax.config.schema import Config
from sft_jax.errors import ConfigError
from sft_jax.nn.stack import alike, most_blocks
from sft_jax.nn.template import Template
from sft_jax.paths import alternatives
from sft_jax.train.optim import by_element, kinds
from sft_jax.train.state import TrainState

WITH_A_HOST = ("gpu", "tpu")  # platforms whose devices have memory of their own
MANY = 16  # blocks from which on `auto` scans


def check(config: Config, mesh: Mesh) -> None:
    """Products can be put aside where there is a memory beside that of the device."""
    platform = mesh.devices.flat[0].platform
    if config.train.remat == "offload" and platform not in WITH_A_HOST:
        raise ConfigError(
            f"train.remat: offload moves to the host's memory, which a {platform} has no other than; it is for "
            f"{' and '.join(WITH_A_HOST)}; set it to dots or full"
        )


def held(
    config: Config, template: Template, frozen: Collection[str], loaded: Collection[str], steps: int
) -> tuple[Template, str | None]:
    """(the template with layers held as `train.scan` asks, why they are not)."""
    asked = config.train.scan
    if asked == "never" or (asked == "auto" and most_blocks(template) < MANY):
        return template, None
    paths = [path for path in template.keys if path not in template.stats]
    begins = kinds(config.optim, steps, paths, config.train.unfreeze)

    def label(path: str) -> Hashable:
        return path in frozen, path in loaded, begins.get(path)

    groups = alike(template, label, 2 if asked == "always" else MANY)
    reason = None
    if not groups:
        reason = "no two layers in turn are alike in structure and in what is frozen, unfrozen and penalised"
    elif not by_element(config.optim):
        reason = f"optim.name: {config.optim.name} looks at a parameter as a whole, so that layers cannot share one"
    if reason and asked == "always":
        raise ConfigError(f"train.scan: always, but {reason}; set it to auto")
    return (template, reason) if reason else (template.stacked(groups), None)


def by_key(template: Template, paths: Collection[str]) -> frozenset[str]:
    """The keys that hold these paths."""
    return frozenset(key for key in template.keys if template.paths([key])[0] in paths)


def saved(template: Template, leaves: Sequence[str]) -> Template | None:
    """The template whose layers are held as in a checkpoint with these leaves; None where it is the same."""
    trained = {leaf.removeprefix("params/") for leaf in leaves if leaf.startswith("params/")}
    if trained <= {*template.keys}:
        return None
    looped = template.looped
    groups = [tuple(alternatives(key)) for key in trained if "{" in key]
    known = {*looped.keys}
    if not all(path in known for group in groups for path in group):
        return None  # of another model: that is said where it is restored
    return looped.stacked(groups) if groups else looped


def held_as(state: TrainState, before: Template, after: Template, wanted: TrainState, shardings: Any) -> TrainState:
    """A state whose layers were held in one way, held in another."""

    def moved(state: TrainState) -> TrainState:
        flat = {}
        for place, leaf in jax.tree_util.tree_leaves_with_path(state):
            for number, layer in enumerate(_layers(place, before)):
                flat[layer] = leaf if layer == place else leaf[number]

        def gathered(place: Any, like: Any) -> Any:
            layers = _layers(place, after)
            return flat[place] if layers == [place] else jnp.stack([flat[layer] for layer in layers])

        return jax.tree_util.tree_map_with_path(gathered, wanted)

    return jax.jit(moved, out_shardings=shardings)(state)


def _layers(place: tuple[Any, ...], template: Template) -> list[tuple[Any, ...]]:
    """A place in a tree, for each layer that is held there."""
    for number, entry in enumerate(place):
        key = getattr(entry, "key", None)
        if key in template.held:
            named = (jax.tree_util.DictKey(path) for path in template.held[key])
            return [(*place[:number], name, *place[number + 1 :]) for name in named]
    return [place]
