"""Every key of a `config.json` that the reference reads is computed here, refused by name, or known to change nothing.

The reference is the `transformers` that is installed: its source is read, not run.
"""

import ast
import importlib.util
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest
from test_families import HEAD, HEADS, config_of
from transformers import CONFIG_MAPPING

from sft_jax.errors import ModelError
from sft_jax.models.family import FAMILIES, HARMLESS, PLAIN, WHEN_WRITING, Head, Seen, build_model, find_family

HOME = Path(next(iter(importlib.util.find_spec("transformers").submodule_search_locations)))
FOLDERS = {"xlm-roberta": "xlm_roberta", "gemma3_text": "gemma3"}
# Files that all models share: what they read of a configuration, they read of every one.
SOURCES = ("modeling", "configuration")
SHARED = ("masking_utils.py", "modeling_layers.py", "modeling_rope_utils.py", "cache_utils.py", "modeling_utils.py")
# What is called on a configuration or set by the program; keys of other things that are called a configuration.
NO_KEYS = (
    "add", "append", "attribute_map", "base_model_pp_plan", "base_model_tp_plan", "compile_config",
    "create_compatible_mapping", "default_config_fields", "device_map", "device_mesh", "disable_mmap",
    "disk_offload_folder", "distributed_config", "from_model_config", "from_pretrained", "fusion_config", "get",
    "get_mtp_config", "get_text_config", "gradient_checkpointing", "hf_quantizer", "ignore_mismatched_sizes",
    "is_heterogeneous", "is_quantized", "items", "keys", "kv_sharing_modes", "nested_rope_parameter_keys",
    "number_of_conv_states", "popleft", "pretrained_model_name_or_path", "quant_method", "sanitize_kernel_mapping",
    "save_pretrained", "sharded_metadata", "standardize_rope_params", "sub_configs", "to_dict", "update",
    "validate_rope", "values", "weight_mapping", "weights_only",
)  # fmt: skip
# Of heads that predict several tokens, and of kinds of models that no family here is.
OF_OTHERS = (
    "chain_hidden_post_norm", "logits_mup_width_multiplier", "mtp_hidden_states_first", "unpadded_vocab_size",
)  # fmt: skip
# Keys that a family reads when others say so.
SAID = [
    {},
    {"head_dim": 4, "use_sliding_window": True, "sliding_window": 5, "classifier_dropout": None},
    {"rope_scaling": None, "rope_parameters": None, "use_swiglu_ffn": True},
]


def asked(source: str) -> Iterator[str]:
    """The attributes of whatever is called a configuration in a source, also by `getattr` and `hasattr`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            holder = node.value
            name = holder.id if isinstance(holder, ast.Name) else getattr(holder, "attr", "")
            if name.endswith("config") or name.endswith("get_text_config"):
                yield node.attr
            if isinstance(holder, ast.Call) and getattr(holder.func, "attr", "") == "get_text_config":
                yield node.attr
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            holder, key, *_ = [*node.args, None]
            if "config" in ast.unparse(holder) and isinstance(key, ast.Constant):
                yield key.value


def fields(source: str) -> Iterator[str]:
    """The fields of the configurations that a source declares."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            yield from (
                n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
            )


@lru_cache
def parts(file: Path) -> dict[str, str]:
    """The functions and classes of a source, by name."""
    text = file.read_text(encoding="utf-8")
    named = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {node.name: ast.get_source_segment(text, node) or "" for node in named}


def used(file: Path, source: str) -> list[str]:
    """The functions and classes of a file that a source names, and those that these name."""
    found, waiting = {}, [source]
    while waiting:
        words = set(re.findall(r"\w+", waiting.pop()))
        new = {name: text for name, text in parts(file).items() if name in words and name not in found}
        found |= new
        waiting += new.values()
    return list(found.values())


def folder_of(name: str) -> Path:
    return HOME / "models" / FOLDERS.get(name, name)


def reference(name: str) -> set[str]:
    """All keys that the reference reads of a `config.json` of this model type."""
    modelling, configuration = (folder_of(name) / f"{kind}_{folder_of(name).name}.py" for kind in SOURCES)
    source = modelling.read_text(encoding="utf-8")
    found = {*asked(source), *fields(configuration.read_text(encoding="utf-8"))}
    for file in SHARED:
        found |= {key for part in used(HOME / file, source) for key in asked(part)}
    return {key for key in found if not key.startswith("_")} - {*NO_KEYS, *OF_OTHERS}


def ours(name: str) -> set[str]:
    """All keys that we know of it, whatever becomes of them."""
    names = find_family({"model_type": name}, "").names.get(name, {})
    found = ours_alone(name)
    return found | {other for other, own in names.items() if own in found} | {*PLAIN, *WHEN_WRITING}


def ours_alone(name: str) -> set[str]:
    """The keys that the family of a model type reads."""
    family, found = find_family({"model_type": name}, ""), set()
    for changes in SAID:
        seen = Seen(config_of(name, **changes))
        family.table(family.configure(seen, None), Head(HEADS[name][0], 2))
        found |= seen.read
    return found


@pytest.mark.parametrize("name", [name for name in FAMILIES if "causal_lm" in HEADS[name]])
def test_windows_that_are_of_writing_alone(name):
    """Fault C: what `transformers` obeys in the cache of an answer and nowhere else is refused where answers are."""
    told = {key: {"layer_types": ["sliding_attention", "full_attention"]}.get(key, 4) for key in WHEN_WRITING}
    for key in set(told) - ours_alone(name):
        with pytest.raises(ModelError, match=f"{key}=.* is not supported"):
            build_model(config_of(name, **{key: told[key]}), Head("causal_lm", 0), name)
        assert build_model(config_of(name, **{key: told[key]}), Head("sequence_classification", 2), name)
    plain = config_of(name, layer_types=["full_attention"] * 2, use_sliding_window=False)
    build_model({**plain, "sliding_window": None}, Head("causal_lm", 0), name)


def test_second_names_are_those_of_the_reference():
    """Fault C: a key may be called as `transformers` calls it for all models (`hidden_size` for `n_embd`)."""
    for name in FAMILIES:
        theirs = CONFIG_MAPPING[name].attribute_map
        assert find_family({"model_type": name}, "").names.get(name, {}) == theirs
    plain, other = config_of("gpt2"), config_of("gpt2")
    other["hidden_size"] = other.pop("n_embd")
    assert build_model(other, HEAD, "").config == build_model(plain, HEAD, "").config


def test_keys_that_nobody_knows_are_named():
    """Fault C: a key that nothing here or there reads is counted by name."""
    assert build_model(config_of("llama"), HEAD, "").unread == ()
    assert build_model(config_of("llama", attention_multiplier=2.0), HEAD, "").unread == ("attention_multiplier",)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_key_that_the_reference_reads_is_known(name):
    """C26, fault C: a key that `transformers` obeys and a family's file does not know is named here."""
    known = ours(name) | {*HARMLESS, *find_family({"model_type": name}, "").unread}
    assert reference(name) - known == set()
