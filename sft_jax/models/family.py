"""What a model family is, and the list of those there are.

A family is one file: configuration from `config.json`, modules, the weight table, and one `FAMILY` value. Loading is
the same for all and stands here. Knows no task: a head is asked for by its kind.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from types import NoneType
from typing import Any, get_args, get_origin

import numpy as np
from flax import nnx

from sft_jax.config.adapter import AdapterSection
from sft_jax.errors import ModelError, did_you_mean
from sft_jax.nn import lora
from sft_jax.nn.heads import ON_VOCABULARY
from sft_jax.nn.kernels import Hardware, use
from sft_jax.nn.layers import ACTIVATIONS
from sft_jax.nn.stack import divide, rematerialise
from sft_jax.nn.template import Template
from sft_jax.weights.files import Checkpoint
from sft_jax.weights.table import Anew, Matched, Table, check_covers, load, match

# Name in `config.json` ("model_type") -> the file in this folder. One line a family.
FAMILIES = {
    "bert": "bert",
    "distilbert": "distilbert",
    "roberta": "roberta",
    "xlm-roberta": "roberta",
    "camembert": "roberta",
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "qwen3": "llama",
    "phi3": "llama",
    "gemma": "gemma",
    "gemma2": "gemma",
    "gemma3_text": "gemma3",
    "resnet": "resnet",
    "vit": "vit",
    "dinov2": "dinov2",
    "marian": "marian",
    "t5": "t5",
}
NO_LIMIT = 2**31


@dataclass(frozen=True)
class Head:
    """What a task asks of a model: a kind of head and how many outputs it has."""

    kind: str
    size: int


@dataclass(frozen=True)
class Family:
    """A family of models, as plain functions of its own configuration type."""

    configure: Callable[[dict[str, Any], float | None], Any]  # (config.json, dropout override) -> configuration
    build: Callable[[Any, Head], nnx.Module]  # a module of abstract parameters; see `nn.template`
    table: Callable[[Any, Head], Table]
    heads: dict[str, str]  # kind of head -> ending of the class that `transformers` reads it with
    classes: dict[str, str]  # model type -> beginning of that class
    limits: Callable[[Any], dict[str, int]]  # of each input that is looked up in a table, the first number too large


@dataclass(frozen=True)
class Model:
    """A model without its numbers: the family's configuration, the template and the weight table."""

    family: Family
    config: Any
    head: Head
    template: Template
    table: Table
    limits: dict[str, int]
    adapters: Mapping[str, lora.Adapter]  # by the path of the layer; the table has none

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """Logical axes of every parameter, those of adapters too."""
        return self.table.axes | lora.axes_of(self.adapters, self.table.axes)

    @property
    def max_length(self) -> int:
        """The longest document, in tokens; of a model without a table of positions any."""
        return self.limits.get("position_ids", NO_LIMIT)

    def is_class(self, name: str) -> bool:
        """Whether a class of `transformers`, by its name, has a head of this kind; a bare model has none."""
        return name.endswith(self.family.heads[self.head.kind])


def find_family(config: dict[str, Any], where: str) -> Family:
    """The family of a `config.json`; refuses one that is not among `FAMILIES`."""
    name = str(config.get("model_type"))
    if name not in FAMILIES:
        hint = did_you_mean(name, FAMILIES)
        raise ModelError(f"{where}: model type '{name}' is not supported{hint} (known: {', '.join(FAMILIES)})")
    return importlib.import_module(f"sft_jax.models.{FAMILIES[name]}").FAMILY


def build_model(
    config: dict[str, Any],
    head: Head,
    where: str,
    dropout: float | None = None,
    embedding_noise: float = 0.0,
    adapter: AdapterSection | Mapping[str, lora.Adapter] | None = None,
    remat: str = "none",
    attention: str = "xla",
    hardware: Hardware | None = None,
) -> Model:
    """The model that a `config.json` describes, with a head of the kind asked for; allocates nothing.

    `adapter` says which layers have one, by patterns or by their paths. Attention is XLA's unless it is said what
    hardware there is.
    """
    family = find_family(config, where)
    if head.kind not in family.heads:
        raise ModelError(
            f"{where}: {config['model_type']} has no head '{head.kind}'; it has: {', '.join(family.heads)}"
        )
    try:
        settings = family.configure(config, dropout)
    except KeyError as error:
        raise ModelError(f"{where}: config.json lacks {error}; fetch the checkpoint again") from None
    if embedding_noise:
        if not hasattr(settings, "embedding_noise"):
            raise ModelError(f"{where}: {config['model_type']} has no embeddings that noise could be added to")
        settings = replace(settings, embedding_noise=embedding_noise)
    module, table, limits = family.build(settings, head), family.table(settings, head), family.limits(settings)
    rematerialise(module, remat)
    if hardware is not None:
        use(module, attention, hardware, where)
        divide(module, hardware.over)
    template, layers = Template.of(module), lora.layers_of(module)
    check_covers(table, template.keys)
    if adapter is None:
        return Model(family, settings, head, template, table, limits, {})
    if isinstance(adapter, AdapterSection):
        # Words are read again by a tied head, or by the other side.
        shared = "decoder_input_ids" in limits or (head.kind in ON_VOCABULARY and getattr(settings, "tied", False))
        adapter = lora.planned(adapter, layers, shared)
    lora.attach(layers, adapter)
    return Model(family, settings, head, Template.of(module), table, limits, adapter)


def load_model(
    model: Model, checkpoint: Checkpoint, *, anew: Anew = "nothing"
) -> tuple[Matched, dict[str, np.ndarray]]:
    """What a checkpoint holds of a model, and those numbers in our layout."""
    where = str(checkpoint.directory)
    matched = match(model.table, model.template.looped.shapes, checkpoint.shapes, where, anew=anew)
    return matched, load(model.table, matched, checkpoint.read)


def check_fields(config: Any, most: Mapping[str, float], may_be_0: tuple[str, ...] = ()) -> None:
    """Numbers and words of a family's configuration must be such; whole numbers at least 1, unless they may be 0."""
    for field in fields(config):
        value: Any = getattr(config, field.name)
        kinds: tuple[Any, ...] = get_args(field.type) or (field.type,)
        if get_origin(field.type) is tuple or (NoneType in kinds and getattr(config, field.name) is None):
            continue
        kind = kinds[0]
        least, highest = 1 if kind is int and field.name not in may_be_0 else 0, most.get(field.name, 2**31)
        fitting = type(value) in ((int, float) if kind is float else (kind,))
        if not fitting or (kind in (int, float) and not least <= value <= highest):
            number = f" of at least {least} and at most {highest}" if kind in (int, float) else ""
            raise ModelError(f"config.json: {field.name} is {value!r:.60}, expected {kind.__name__}{number}")


def check_activation(name: str) -> None:
    """An activation must be among those there are."""
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        hint = did_you_mean(name, ACTIVATIONS)
        raise ModelError(f"config.json: activation '{name}' is not supported{hint} (known: {known})")


def check_images(shape: tuple[int, ...], channels: int, least: int) -> None:
    """A batch of images [r, h, w, c] must have the channels that a model is made for, and no side shorter than this."""
    _, height, width, found = shape
    if found != channels or min(height, width) < least:
        raise ModelError(
            f"images: {height} x {width} pixels of {found} channels, expected {channels} channels and sides of at "
            f"least {least}; mend preprocessor_config.json"
        )


def whole(config: dict[str, Any], key: str, default: int | None = None, most: int = 2**31) -> int:
    """A whole number of a `config.json` that others are computed from; null and, given a default, missing is that."""
    value: Any = config.get(key)
    value = (config[key] if default is None else default) if value is None else value
    if type(value) is not int or not 1 <= value <= most:
        raise ModelError(f"config.json: {key} is {value!r:.60}, expected int of at least 1 and at most {most}")
    return value


def refuse(config: dict[str, Any], where: str, expected: dict[str, Any]) -> None:
    """Refuse settings of a `config.json` that the family does not compute, rather than ignore them."""
    for key, plain in expected.items():
        if config.get(key, plain) != plain:
            raise ModelError(f"{where}: {key}={config[key]!r} is not supported; only {plain!r} is")
