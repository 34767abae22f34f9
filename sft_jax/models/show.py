"""The parameters of a model as people name them in patterns, beside their names in its checkpoint."""

import re
from collections.abc import Sequence

from sft_jax import assets
from sft_jax.models.family import Head, build_model, find_family
from sft_jax.weights.files import find, open_checkpoint
from sft_jax.weights.table import Row

BLOCK = re.compile(r"(?<=blocks/)\d+")


def parameters(source: str, revision: str | None = None) -> list[tuple[str, str, str]]:
    """(path, shape, name in the checkpoint) of each parameter of a model with the head that its class has.

    Blocks that are alike are one, `blocks/{0..11}/attn/q/kernel`, which is a pattern too. No weights are read.
    """
    checkpoint = open_checkpoint(find(assets.resolve(source), revision, weights=False), weights=False)
    where, config = str(checkpoint.directory), checkpoint.config
    heads, classes = find_family(config, where).heads, [str(name) for name in config.get("architectures") or ()]
    named = (kind for kind, ending in heads.items() if any(name.endswith(ending) for name in classes))
    model = build_model(config, Head(next(named, next(iter(heads))), len(config.get("id2label") or "12")), where)
    shapes = model.template.looped.shapes
    alike: dict[tuple[str, tuple[int, ...]], list[Row]] = {}
    for row in model.table.rows:
        alike.setdefault((BLOCK.sub("*", row.ours), shapes[row.ours]), []).append(row)
    return [
        (
            _together([row.ours for row in rows], "/"),
            " × ".join(map(str, shape)),
            _together([r.theirs for r in rows], "."),
        )
        for (_, shape), rows in alike.items()
    ]


def _together(names: Sequence[str], between: str) -> str:
    """Names that differ in numbers as one: `layer.{0..11}.bias`."""
    found = []
    for parts in zip(*(name.split(between) for name in names), strict=True):
        numbers = [int(part) for part in parts] if len({*parts}) > 1 else []
        in_turn = numbers and numbers == list(range(numbers[0], numbers[-1] + 1))
        several = f"{numbers[0]}..{numbers[-1]}" if in_turn else ",".join(parts)
        found.append(f"{{{several}}}" if numbers else parts[0])
    return between.join(found)
