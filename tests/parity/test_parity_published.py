"""What a run publishes is what it has: exported files give its outputs in `transformers`, alone and in batches."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch_reference import (
    CASES,
    KINDS,
    TOLERANCE,
    Pair,
    one_a_row,
    our_logits,
    paired,
    randomised,
    torch,
    transformers,
)

from sft_jax import publish as publishing
from sft_jax.config.tasks import SequenceClassification
from sft_jax.data.batch import Encoded
from sft_jax.data.text import load_tokenizer, tokenize
from sft_jax.errors import RunError
from sft_jax.export import About, export_model
from sft_jax.run import initial, prepare
from sft_jax.tasks.task import build_task
from sft_jax.weights.files import open_checkpoint

WORDS = [f"w{number}" for number in range(40)]
TEXTS = [" ".join(WORDS[begin : begin + length]) for begin, length in ((0, 3), (5, 9), (20, 1), (11, 17))]


def write_tokenizer(home: Path, **settings: Any) -> None:
    """A tokenizer of words that ends each text with its end token, and has no padding token."""
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    whole = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    whole.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    whole.add_special_tokens(["<unk>", "<s>", "</s>"])
    whole.save(str(home / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (home / "tokenizer_config.json").write_text(json.dumps({**said, **settings}))


def source(name: str, kind: str, home: Path, pad: int | None) -> Pair:
    """A decoder whose files name this padding id, whose tokenizer has none and pads on the left."""
    family, settings = CASES[name]
    lower = {"n_layer": 1} if name == "gpt2" else {"num_hidden_layers": 1}
    pair = paired(randomised(family, {**settings, **lower, "num_labels": 3, "pad_token_id": pad}, 0, 0.3, kind), home)
    write_tokenizer(home, padding_side="left")
    return pair


def exported(pair: Pair, home: Path, kind: str, out: Path, *, last: frozenset[int]) -> Path:
    """The pair as an export, where documents end with these tokens."""
    section = SequenceClassification(kind="sequence_classification", labels=["a", "b", "c"])
    task = dataclasses.replace(build_task(section, {}), head=pair.model.head)
    config = open_checkpoint(home).config
    export_model(out, pair.model, pair.params, About(config, task, home, 32, "", None, load_tokenizer(home), last))
    return out


def theirs(out: Path, kind: str, texts: list[str]) -> list[np.ndarray]:
    """The logits of each text, or of its tokens, by `transformers` from exported files, as one padded batch."""
    model = KINDS[kind][0].from_pretrained(out, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    batch = tokenizer(texts, padding=len(texts) > 1, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits
    if kind == "sequence_classification":
        return list(logits.numpy())
    return [row[seen].numpy() for row, seen in zip(logits, batch["attention_mask"] > 0, strict=True)]


@pytest.mark.parametrize(("name", "kind", "pad"), [
    ("gpt2", "sequence_classification", None),
    ("llama", "sequence_classification", None),
    ("llama", "sequence_classification", 2),  # the token that ends every text
    ("gpt2", "token_classification", None),
])  # fmt: skip
def test_exports_alone_and_in_batches(name, kind, pad, tmp_path):
    """Fault P: texts alone and in padded batches have our logits there, whatever the base says of padding."""
    pair = source(name, kind, tmp_path / "source", pad)
    tokens = tokenize(load_tokenizer(tmp_path / "source"), TEXTS, None, 32)
    out = exported(pair, tmp_path / "source", kind, tmp_path / "out", last=frozenset({2}))
    expected = our_logits(pair, one_a_row(Encoded(tokens.fields, tokens.offsets, {})))
    batch = np.concatenate([np.atleast_2d(one) for one in theirs(out, kind, TEXTS)])
    alone = np.concatenate([np.atleast_2d(one) for text in TEXTS for one in theirs(out, kind, [text])])
    assert np.abs(batch - expected).max() < TOLERANCE and np.abs(alone - expected).max() < TOLERANCE
    if pad is None and kind == "sequence_classification":  # control: padded with what ends a text, each loses its end
        wrong = theirs(exported(pair, tmp_path / "source", kind, tmp_path / "wrong", last=frozenset()), kind, TEXTS)
        assert np.abs(np.asarray(wrong) - expected).max() > 0.01


def test_what_differs_is_not_published(configure, tmp_path, monkeypatch):
    """Exports are compared: other outputs, numbers or tokens than the run's are refused, and what was written kept."""
    run = prepare(configure("model.head=new", "train.steps=1"))
    state, frozen = initial(run)
    out, aside = tmp_path / "model", tmp_path / "model-refused"

    def published() -> None:
        publishing.publish(run, state, frozen, out, {}, replace=True)

    published()
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    described, wrong = publishing.described, {"layer_norm_eps": 0.1}
    with monkeypatch.context() as patched:
        patched.setattr(publishing, "described", lambda *given: described(*given) | wrong)
        with pytest.raises(RunError, match=r"logits differ from those of the run by .*; nothing was written"):
            published()
    tensors = publishing.export_model.__globals__["save"]
    files = run.task.reader.files

    def other(table: Any, params: Any) -> Any:
        saved = tensors(table, params)
        return {name: tensor + (name == "classifier.bias") for name, tensor in saved.items()}

    def renamed(home: Path) -> dict[str, bytes]:
        found = files(home)
        return {**found, "tokenizer.json": found["tokenizer.json"].replace(b'"bara"', b'"arab"')}

    reader = run.task.reader._replace(files=renamed)
    with monkeypatch.context() as patched:
        patched.setitem(publishing.export_model.__globals__, "save", other)
        with pytest.raises(RunError, match=r"model-refused holds what was written(.|\n)*head/out/bias: other numbers"):
            published()
    assert (aside / "model.safetensors").is_file()
    run = dataclasses.replace(run, task=dataclasses.replace(run.task, reader=reader))
    with pytest.raises(RunError, match="input_ids: the exported tokenizer gives others for the first rows"):
        published()
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
