"""Adapter directories in both directions with the `peft` library: equal logits of the same documents."""
# ruff: noqa: E402

import json
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from torch_reference import (
    LONGEST,
    Pair,
    documents,
    in_order,
    kind_of,
    one_a_row,
    paired,
    reference_model,
    torch,
    torch_logits,
)

peft = pytest.importorskip("peft", reason="the library whose directories are read and written is not installed")

from sft_jax.adapt import merge
from sft_jax.adapt.begin import begin
from sft_jax.adapt.peft import HARMLESS, PLAIN, READ, read, write
from sft_jax.config.adapter import AdapterSection
from sft_jax.errors import ModelError
from sft_jax.models.family import build_model
from sft_jax.nn.lora import is_adapter
from sft_jax.weights.files import open_checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]
CLASSES, TOKENS, WORDS = "sequence_classification", "token_classification", "causal_lm"
# What -> (case, kind of head, section). GPT-2 and Phi-3 keep several layers in one tensor.
OURS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert lora": ("bert", CLASSES, {}),
    "bert rslora": ("bert", CLASSES, {"scaling": "root", "match": ["**/mlp/*", "**/attn/o"]}),
    "bert dora": ("bert", TOKENS, {"kind": "dora"}),
    "bert words": ("bert", CLASSES, {"match": ["embed/word", "**/attn/k"]}),
    "bert sized words": ("bert", CLASSES, {"match": ["embed/word"], "kind": "dora"}),
    "gpt2 lora": ("gpt2", WORDS, {"match": ["**/attn/*"]}),
    "gpt2 queries and values": ("gpt2", CLASSES, {}),
    "gpt2 dora": ("gpt2", WORDS, {"kind": "dora", "match": ["**/attn/{q,o}", "**/mlp/*"]}),
    "llama rslora": ("llama", WORDS, {"scaling": "root"}),
    "llama some layers": ("llama", WORDS, {"match": ["blocks/{0,2}/mlp/*"], "kind": "dora"}),
    "phi3 lora": ("phi3", WORDS, {"match": ["**/attn/{k,v}", "**/mlp/up"]}),
    "phi3 dora": ("phi3", CLASSES, {"kind": "dora", "match": ["**/attn/*", "**/mlp/*"]}),
}


def adapted(pair: Pair, section: AdapterSection) -> tuple[Any, dict[str, np.ndarray]]:
    """(the model of a pair with adapters, its parameters): every number of them and of a new head is drawn."""
    config = open_checkpoint(pair.directory).config
    model = build_model(config, pair.model.head, "made up", adapter=section)
    params = begin(section, model.adapters, pair.params)
    missing = [path for path in model.template.keys if path not in params]
    params |= {p: np.asarray(a) for p, a in model.template.initial(jax.random.key(1), missing).items()}
    draw = np.random.default_rng(3)
    for path in params:
        if is_adapter(path) or (path.startswith("head/") and pair.model.head.kind != WORDS):
            params[path] = params[path] + 0.2 * draw.normal(size=params[path].shape).astype(np.float32)
    return model, params


def logits_of(model: Any, params: dict[str, np.ndarray], pair: Pair, encoded: Any) -> np.ndarray:
    """Our logits by document or token."""
    from torch_reference import dense

    batch = one_a_row(encoded, LONGEST + 3)
    return in_order(
        jax.jit(lambda p, b: dense(model.template.bind(p)(b)))(params, batch), batch, kind_of(pair.reference)
    )


@pytest.mark.parametrize("name", OURS)
def test_peft_reads_what_we_write(name: str, tmp_path: Path):
    """R-C19: `PeftModel.from_pretrained` gives our logits, a new head included, and reading back gives our arrays."""
    case, kind, given = OURS[name]
    pair = paired(reference_model(case, kind), tmp_path / "base")
    section = AdapterSection(rank=3, alpha=5.0, **given)
    model, params = adapted(pair, section)
    (tmp_path / "adapter").mkdir()
    head = {path for path in params if path.startswith("head/") and kind != WORDS}
    root = section.scaling == "root"
    write(
        tmp_path / "adapter", model.table, model.adapters, params, head, kind=kind, base=str(pair.directory), root=root
    )
    encoded = documents(pair.reference, 5)
    ours = logits_of(model, params, pair, encoded)
    plain = torch_logits(pair.reference, encoded)
    theirs = torch_logits(peft.PeftModel.from_pretrained(pair.reference, tmp_path / "adapter").eval(), encoded)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert np.abs(ours - plain).max() > 1e-2  # control: the adapter does something
    whole = merge.merge(model.adapters, params)
    np.testing.assert_allclose(logits_of(pair.model, whole, pair, encoded), ours, rtol=1e-4, atol=1e-4)
    found = read(tmp_path / "adapter", model.table, model.template.shapes)
    assert found.plan.keys() == model.adapters.keys()
    for path, array in found.arrays.items():
        np.testing.assert_allclose(array, params[path], rtol=1e-6, atol=1e-7, err_msg=path)
    assert found.arrays.keys() == {path for path in params if is_adapter(path)} | head


# What -> (case, kind of head, what peft's configuration says).
THEIRS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("bert", CLASSES, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "bert sized": (
        "bert",
        CLASSES,
        {"target_modules": ["query", "dense"], "use_dora": True, "exclude_modules": "pooler"},
    ),
    "gpt2": ("gpt2", WORDS, {"target_modules": ["c_attn", "c_proj"], "use_rslora": True}),
    "gpt2 sized": ("gpt2", WORDS, {"target_modules": ["c_attn"], "use_dora": True}),
    "phi3": ("phi3", WORDS, {"target_modules": ["qkv_proj", "gate_up_proj"], "alpha_pattern": {"qkv_proj": 11}}),
    "llama": ("llama", WORDS, {"target_modules": "all-linear", "rank_pattern": {"k_proj": 2}}),
    "llama words": ("llama", WORDS, {"target_modules": ["embed_tokens", "q_proj"]}),
}


@pytest.mark.parametrize("name", THEIRS)
def test_we_read_what_peft_writes(name: str, tmp_path: Path):
    """R-C19: a directory that `save_pretrained` wrote gives the logits of the model that wrote it."""
    case, kind, given = THEIRS[name]
    pair = paired(reference_model(case, kind), tmp_path / "base")
    if name == "bert sized":
        given = {**given, "target_modules": r".*layer.*\.(query|dense)", "exclude_modules": None}
    wrapped = peft.get_peft_model(pair.reference, peft.LoraConfig(r=4, lora_alpha=6, **given)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in wrapped.named_parameters():
            if "lora_" in parameter_name or "modules_to_save" in parameter_name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(tmp_path / "adapter")
    found = read(tmp_path / "adapter", pair.model.table, pair.model.template.shapes)
    config = open_checkpoint(pair.directory).config
    model = build_model(config, pair.model.head, "made up", adapter=found.plan)
    encoded = documents(pair.reference, 5)
    ours = logits_of(model, {**pair.params, **found.arrays}, pair, encoded)
    np.testing.assert_allclose(ours, torch_logits(pair.reference, encoded), rtol=1e-4, atol=1e-4)
    wrong = {path: replace(adapter, scale=1.1 * adapter.scale) for path, adapter in found.plan.items()}
    apart = logits_of(
        build_model(config, pair.model.head, "", adapter=wrong), {**pair.params, **found.arrays}, pair, encoded
    )
    assert np.abs(apart - ours).max() > 1e-3  # control: another factor would be seen


@pytest.mark.parametrize("begun", ["gaussian", "orthogonal", "mica", "eva", "pissa", "olora", "pissa_niter_2"])
def test_how_an_adapter_was_begun(begun: str, tmp_path: Path):
    """Fault B: an adapter that left the base as it was is what `peft` loads; one that changed it is refused by name."""
    base = paired(reference_model("bert"), tmp_path / "base")
    given = {"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(reference_model("bert"), peft.LoraConfig(init_lora_weights=begun, **given))
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.2 * torch.randn(parameter.shape))
        wrapped.save_pretrained(tmp_path / "adapter")
        loaded = peft.PeftModel.from_pretrained(reference_model("bert"), tmp_path / "adapter").eval()
    encoded = documents(base.reference, 4)
    if begun.startswith(("pissa", "olora")):
        with pytest.raises(ModelError, match=f"init_lora_weights='{begun}' changed the base"):
            read(tmp_path / "adapter", base.model.table, base.model.template.shapes)
        return
    found = read(tmp_path / "adapter", base.model.table, base.model.template.shapes)
    model = build_model(open_checkpoint(base.directory).config, base.model.head, "", adapter=found.plan)
    ours = logits_of(model, {**base.params, **found.arrays}, base, encoded)
    np.testing.assert_allclose(ours, torch_logits(loaded, encoded), rtol=1e-4, atol=1e-4)


def test_every_field_of_peft_is_known(tmp_path: Path):
    """Fault B: each field of the installed `LoraConfig` is computed, refused by name, or known to change nothing."""
    names = {field.name for field in fields(peft.LoraConfig)}
    assert names - {*READ, *HARMLESS, *PLAIN} == set()
    pair = paired(reference_model("bert"), tmp_path / "base")
    peft.get_peft_model(pair.reference, peft.LoraConfig(target_modules=["query"])).save_pretrained(tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    changes = {
        **{name: {"a": 1} for name in PLAIN},
        "use_magic": True,
        "init_lora_weights": "lora_ga",
        "use_dora": True,
        "target_modules": ["value"],
        "exclude_modules": ["query"],
        "layers_to_transform": [1],
    }
    for name, value in changes.items():
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**written, name: value}))
        with pytest.raises(ModelError, match=f"{name}=|does not name this layer"):
            read(tmp_path / "adapter", pair.model.table, pair.model.template.shapes)


def test_what_cannot_be_read_is_named(tmp_path: Path):
    """Directories of other methods, other models and other options are refused by name."""
    pair = paired(reference_model("bert"), tmp_path / "base")
    said = [
        (peft.LoraConfig(target_modules=["query"], bias="all"), "bias='all' is not supported"),
        (peft.IA3Config(target_modules=["query"], feedforward_modules=[]), "peft_type is 'IA3'"),
    ]
    for number, (config, message) in enumerate(said):
        peft.get_peft_model(reference_model("bert"), config).save_pretrained(tmp_path / str(number))
        with pytest.raises(ModelError, match=message):
            read(tmp_path / str(number), pair.model.table, pair.model.template.shapes)
    peft.get_peft_model(reference_model("gpt2"), peft.LoraConfig(target_modules=["c_attn"])).save_pretrained(
        tmp_path / "other"
    )
    with pytest.raises(ModelError, match="the model has no such layer"):
        read(tmp_path / "other", pair.model.table, pair.model.template.shapes)


def test_words_trained_whole_stay_tied(tmp_path: Path):
    """C19: embeddings that are trained whole beside adapters are the head of a tied model for `peft` as well."""
    pair = paired(reference_model("gpt2", WORDS), tmp_path / "base")
    model, params = adapted(pair, AdapterSection(rank=3))
    words = "embed/word/embedding"
    params[words] = params[words] + 0.3 * np.random.default_rng(5).normal(size=params[words].shape).astype(np.float32)
    (tmp_path / "adapter").mkdir()
    write(
        tmp_path / "adapter",
        model.table,
        model.adapters,
        params,
        {words},
        kind=WORDS,
        base=str(pair.directory),
        root=False,
    )
    found = read(tmp_path / "adapter", model.table, model.template.shapes)
    np.testing.assert_array_equal(found.arrays[words], params[words])
    encoded = documents(pair.reference, 5)
    theirs = torch_logits(peft.PeftModel.from_pretrained(pair.reference, tmp_path / "adapter").eval(), encoded)
    np.testing.assert_allclose(logits_of(model, params, pair, encoded), theirs, rtol=1e-4, atol=1e-4)
