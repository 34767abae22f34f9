"""Checkpoint directories whose `config.json` or `tokenizer.json` says anything at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, write_model
from hostile import budget, junk, mutated, numbers, told
from hypothesis import given
from hypothesis import strategies as st

from sft_jax.data.text import load_tokenizer, tokenize
from sft_jax.errors import ModelError, SftError
from sft_jax.infer.predict import load_predictor
from sft_jax.models.family import Head, build_model, load_model
from sft_jax.weights.files import open_checkpoint

NAMED = {
    "architectures": ["XForSequenceClassification"],
    "id2label": {"0": "no", "1": "yes"},
    "label2id": {"no": 0, "yes": 1},
    "problem_type": "single_label_classification",
    "classifier_dropout": None,
    "layer_norm_eps": 1e-12,
    "sft_jax_task": {"kind": "sequence_classification", "text": "text", "text_pair": None, "max_length": 16},
}
FAMILIES = {
    "bert": {},
    "roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "distilbert": {
        "dim": 16, "n_layers": 1, "n_heads": 4, "hidden_dim": 24, "activation": "gelu", "dropout": 0.0,
        "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "sinusoidal_pos_embds": False,
    },
}  # fmt: skip
SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "pad_token_id",
    "max_position_embeddings", "type_vocab_size", "dim", "n_layers", "n_heads", "hidden_dim",
)  # fmt: skip
TEXTS = ["bara cela", "", "\0", "😀 é \u202e", "x" * 500]


@pytest.fixture(scope="module", params=FAMILIES)
def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound classifier of each family."""
    config = {**SMALL, "model_type": request.param, **FAMILIES[request.param]}
    return write_model(tmp_path_factory.mktemp("models") / request.param, config, head=2)


def tried(act: Callable[[], Any]) -> Any:
    """What came of it, or None where it was refused in the right form."""
    try:
        return act()
    except SftError as error:
        told(error)
        return None


def opened(home: Path, content: Any) -> None:
    """Do with a directory what training and prediction do with it before anything is compiled."""
    (home / "config.json").write_text(json.dumps(content), encoding="utf-8")

    def load() -> None:
        checkpoint = open_checkpoint(home)
        model = build_model(checkpoint.config, Head("sequence_classification", 2), str(home))
        load_model(model, checkpoint)

    tried(load)
    tried(lambda: load_predictor(str(home)))


@given(data=st.data())
@budget(50)
def test_any_value_in_config_json(home: Path, data: st.DataObject):
    """R33: a `config.json` in which values are missing, of the wrong type, not finite or need terabytes."""
    whole = {**json.loads((home / "config.json").read_text()), **NAMED}
    try:
        opened(home, data.draw(mutated(whole)))
    finally:
        (home / "config.json").write_text(json.dumps({k: v for k, v in whole.items()}))


@given(key=st.sampled_from(SIZES), value=numbers)
@budget(40)
def test_any_size_in_config_json(home: Path, key: str, value: Any):
    """R32, R33: a size of any number, a billion layers too, is refused before anything is made of it."""
    whole = {**json.loads((home / "config.json").read_text()), **NAMED}
    try:
        opened(home, {**whole, key: value})
    finally:
        (home / "config.json").write_text(json.dumps(whole))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound directory for a tokenizer that each example writes anew."""
    return write_model(tmp_path_factory.mktemp("tokenizers") / "tiny", SMALL)


def used(home: Path, content: bytes) -> None:
    """Do with a tokenizer what training does."""
    (home / "tokenizer.json").write_bytes(content)
    tried(lambda: tokenize(load_tokenizer(home), TEXTS, None, 16))
    tried(lambda: tokenize(load_tokenizer(home), TEXTS, TEXTS[::-1], 16))


@given(data=st.data())
@budget(100)
def test_any_value_in_tokenizer_json(tokenizer: Path, whole: dict[str, Any], data: st.DataObject):
    """R33: a `tokenizer.json` in which values are missing or anything else."""
    used(tokenizer, json.dumps(data.draw(mutated(whole))).encode())


@given(data=st.data())
@budget(60)
def test_any_bytes_in_tokenizer_json(tokenizer: Path, whole: dict[str, Any], data: st.DataObject):
    """R33: a `tokenizer.json` in which bytes were changed, cut off, or all are any."""
    content = bytearray(json.dumps(whole).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    used(tokenizer, bytes(content[: data.draw(st.integers(0, len(content)))]))
    used(tokenizer, bytes(content))
    used(tokenizer, json.dumps(data.draw(junk)).encode())


def test_what_was_found(home: Path, tokenizer: Path, whole: dict[str, Any]):
    """R33: what longer searches found: classes that are no list, and a template whose token is not there."""
    config = json.loads((home / "config.json").read_text())
    try:
        opened(home, {**config, **NAMED, "architectures": 7, "sft_jax_task": None})
    finally:
        (home / "config.json").write_text(json.dumps(config))
    used(tokenizer, json.dumps({**whole, "post_processor": {**whole["post_processor"], "special_tokens": {}}}).encode())
    (tokenizer / "tokenizer.json").write_text(json.dumps({**whole, "model": {**whole["model"], "vocab": {"bara": 0}}}))
    with pytest.raises(ModelError, match=r"tokenizer\.json: it cannot be used \(.*\); fetch it again"):
        tokenize(load_tokenizer(tokenizer), TEXTS, None, 16)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The content of a sound `tokenizer.json`."""
    home = write_model(tmp_path_factory.mktemp("tokenizers") / "sound", SMALL)
    return json.loads((home / "tokenizer.json").read_text())
