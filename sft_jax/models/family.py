"""What a model family is, and the list of those there are.

A family is one file: configuration from `config.json`, modules, the weight table, and one `FAMILY` value. Loading is
the same for all and stands here. Knows no task: a head is asked for by its kind.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
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
from sft_jax.weights.files import Checkpoint, some
from sft_jax.weights.table import Anew, Matched, Table, check_covers, differing, load, match

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
LM_HEAD = "lm_head.weight"
# Keys of a `config.json` that change no number of a model, in any family: they say how it is begun with, run, saved,
# labelled or asked for answers, or are of heads and losses that the reference has besides.
HARMLESS = (
    "architectures", "attention_dropout", "attn_implementation", "bos_token_id", "chunk_size_feed_forward",
    "decoder_start_token_id", "dtype", "eos_token_id", "finetuning_task", "id2label", "init_std",
    "initializer_factor", "initializer_range", "is_decoder", "is_encoder_decoder", "label2id", "model_type",
    "name_or_path", "num_labels", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type",
    "return_dict", "sep_token_id", "sft_jax_task", "task_specific_params", "torch_dtype", "torchscript",
    "transformers_version", "use_cache",
)  # fmt: skip
# Those by which `transformers` changes any model, and the values at which they change nothing.
PLAIN = {"per_layer_config": None, "transformers_weights": None}
# Those by which it changes what a decoder sees while it writes, but not while it reads, so that both would differ.
WHEN_WRITING = ("attention_chunk_size", "layer_types", "sliding_window")


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
    # What a tied `config.json` says where the head is one of its own; None: there is no such model.
    untied: Callable[[Mapping[str, Any]], dict[str, Any]] | None = lambda config: {"tie_word_embeddings": False}
    names: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # model type -> second names of its keys
    unread: tuple[str, ...] = ()  # keys of `config.json` that `transformers` reads, for what we do not compute


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
    unread: tuple[str, ...] = ()  # keys of its `config.json` that nothing here or in `transformers` is known to read

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
    _, seen, settings = _configured(config, where, dropout)
    if head.kind in ON_VOCABULARY:
        windows = [layer.window is not None for layer in getattr(settings, "layers", ())]
        kinds = ["sliding_attention" if window else "full_attention" for window in windows]
        alike = {"layer_types"} if config.get("layer_types") == kinds else set()  # it says what is computed
        refuse(seen, config["model_type"], {key: None for key in WHEN_WRITING if key not in seen.read | alike})
    unread = tuple(sorted(key for key in config if key not in seen.read | {*HARMLESS, *family.unread}))
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
        return Model(family, settings, head, template, table, limits, {}, unread)
    if isinstance(adapter, AdapterSection):
        # Words are read again by a tied head, or by the other side.
        shared = "decoder_input_ids" in limits or (head.kind in ON_VOCABULARY and getattr(settings, "tied", False))
        adapter = lora.planned(adapter, layers, shared)
    lora.attach(layers, adapter)
    return Model(family, settings, head, Template.of(module), table, limits, adapter, unread)


class Seen(dict[str, Any]):
    """A `config.json` that remembers which of its keys were asked for."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As of any mapping."""
        self.read.add(key)
        return super().get(key, default)


def one_name(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A `config.json` without the second names that `transformers` knows for some keys; both must say the same."""
    found = {key: value for key, value in config.items() if key not in names}
    for other, own in names.items():
        value = config.get(other)
        if value is not None and found.setdefault(own, value) != value:
            raise ModelError(
                f"config.json: {other} is {value!r:.60} and {own} {found[own]!r:.60}, which are two names of one "
                f"thing; remove the wrong one"
            )
    return found


def settled(checkpoint: Checkpoint, head: Head) -> Checkpoint:
    """A checkpoint whose configuration says what its numbers do, for a model with this head.

    A head on the vocabulary that should be the embeddings, and is in the file with numbers of its own, is one of its
    own, as in the reference; other copies that are none are refused.
    """
    where, config = str(checkpoint.directory), checkpoint.config
    family, _, settings = _configured(config, where, None)
    if head.kind not in family.heads:
        return checkpoint  # which `build_model` refuses
    wrong = differing(family.table(settings, head), checkpoint.shapes, checkpoint.read)
    alone = family.untied and LM_HEAD
    others = [f"{name}: expected the numbers of {original}" for name, original in wrong if name != alone]
    if others:
        raise ModelError(some(f"{where}: holds other numbers where only a copy is supported", others))
    if not wrong or not family.untied:
        return checkpoint
    remark = f"{LM_HEAD} differs from {wrong[0][1]}, so both are kept, though config.json says that they are tied"
    return replace(checkpoint, config={**config, **family.untied(config)}, remarks=(*checkpoint.remarks, remark))


def _configured(config: dict[str, Any], where: str, dropout: float | None) -> tuple[Family, Seen, Any]:
    """(the family, what is read of a `config.json`, what the family makes of it)."""
    family = find_family(config, where)
    seen = Seen(one_name(config, family.names.get(config["model_type"], {})))
    refuse(seen, config["model_type"], PLAIN)
    try:
        return family, seen, family.configure(seen, dropout)
    except KeyError as error:
        raise ModelError(f"{where}: config.json lacks {error}; fetch the checkpoint again") from None


def load_model(
    model: Model, checkpoint: Checkpoint, *, anew: Anew = "nothing"
) -> tuple[Matched, dict[str, np.ndarray]]:
    """What a checkpoint holds of a model, and those numbers in our layout."""
    where = str(checkpoint.directory)
    matched = match(model.table, model.template.looped.shapes, checkpoint.shapes, where, anew=anew)
    return matched, load(model.table, matched, checkpoint.read)


def check_fields(config: Any, most: Mapping[str, float], may_be_0: tuple[str, ...] = ()) -> None:
    """Numbers and words of a family's configuration must be such; whole numbers at least 1, unless they may be 0."""
    for own in fields(config):
        value: Any = getattr(config, own.name)
        kinds: tuple[Any, ...] = get_args(own.type) or (own.type,)
        if get_origin(own.type) is tuple or (NoneType in kinds and value is None):
            continue
        kind = kinds[0]
        least, highest = 1 if kind is int and own.name not in may_be_0 else 0, most.get(own.name, 2**31)
        fitting = type(value) in ((int, float) if kind is float else (kind,))
        if not fitting or (kind in (int, float) and not least <= value <= highest):
            number = f" of at least {least} and at most {highest}" if kind in (int, float) else ""
            raise ModelError(f"config.json: {own.name} is {value!r:.60}, expected {kind.__name__}{number}")


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
    """Refuse settings of a `config.json` that the family does not compute, rather than ignore them.

    null is as good as another value that counts as false.
    """
    for key, plain in expected.items():
        if (config.get(key, plain) or None) != (plain or None):
            raise ModelError(f"{where}: {key}={config[key]!r} is not supported; only {plain!r} is")
