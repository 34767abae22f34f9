"""What we export is what `transformers` reads: weights, label names and tokenizer, for every family."""

import dataclasses
import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import ByteLevelBPETokenizer, SentencePieceUnigramTokenizer
from torch_reference import (
    CASES,
    DECODERS,
    TOLERANCE,
    Pair,
    documents,
    gap,
    our_logits,
    paired,
    randomised,
    reference_model,
    rounded,
    several_a_row,
    torch,
    torch_logits,
    transformers,
)

from sft_jax.config.tasks import MultiLabelClassification, Regression, SequenceClassification
from sft_jax.data.rows import Rows
from sft_jax.data.text import load_tokenizer, tokenize
from sft_jax.export import About, export_model
from sft_jax.infer.predict import load_predictor
from sft_jax.jobs import train
from sft_jax.run import prepare
from sft_jax.tasks.task import build_task
from sft_jax.weights.files import open_checkpoint, write_checkpoint

TEXTS = [
    "the film was good",
    "The FILM was, sadly, not good!",
    "naïve café — 漢字 and ½",
    " leading and   many    spaces\ttabs ",
    "[MASK] a mask <mask> in the text",
    "a long text " * 9,
    "?",
]
PAIRED = [*reversed(TEXTS)]
LENGTH = 24
LABELS = ["bad", "fair enough", "good"]
FAMILIES = {"bert": "Bert", "distilbert": "DistilBert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}


def tokenizer_of(family: str) -> "transformers.PreTrainedTokenizerBase":
    """A tokenizer of the kind that the family is published with, trained on next to nothing."""
    corpus = [*TEXTS, "the film was good and bad, goodly badly"] * 3
    if family in ("bert", "distilbert"):
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        pieces = [
            *string.ascii_lowercase,
            *(f"##{c}" for c in string.ascii_lowercase),
            "the",
            "film",
            "##ly",
            ",",
            "漢",
        ]
        kind = transformers.BertTokenizer if family == "bert" else transformers.DistilBertTokenizer
        return kind(vocab={word: number for number, word in enumerate([*special, *pieces])})
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    if family == "roberta":
        trained = ByteLevelBPETokenizer()
        trained.train_from_iterator(corpus, vocab_size=300, special_tokens=special, show_progress=False)
        model = json.loads(trained.to_str())["model"]
        return transformers.RobertaTokenizer(vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]])
    pieces = SentencePieceUnigramTokenizer()
    pieces.train_from_iterator(corpus, vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False)
    vocabulary = json.loads(pieces.to_str())["model"]["vocab"]
    return transformers.XLMRobertaTokenizer(vocab=[tuple(entry) for entry in vocabulary])


def source(family: str, directory: Path, labels: int = len(LABELS), kind: str = "sequence_classification") -> Pair:
    """A pretrained directory as `transformers` writes one: model and tokenizer."""
    tokenizer = tokenizer_of(family)
    tokenizer.save_pretrained(directory)
    size = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 45}
    inner = (
        {"dim": 24, "n_heads": 3, "hidden_dim": 31, "n_layers": 2}
        if family == "distilbert"
        else {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 31, "num_hidden_layers": 2}
    )
    types = {"type_vocab_size": 1} if "roberta" in family else {}
    return paired(randomised(family, {**size, **inner, **types, "num_labels": labels}, 3, 0.3, kind), directory)


def export(pair: Pair, out: Path, section: Any = None) -> Path:
    """Export the loaded parameters as they are."""
    task = build_task(section or SequenceClassification(kind="sequence_classification", labels=LABELS), {})
    config = open_checkpoint(pair.directory).config
    export_model(out, pair.model, pair.params, About(config, task, pair.directory, LENGTH, "a card"))
    return out


def read_back(directory: Path) -> "torch.nn.Module":
    """The exported model by `transformers` alone; nothing may be missing or left over."""
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def reference_logits(directory: Path, texts, pairs=None) -> np.ndarray:
    """Logits by the model and the tokenizer that `transformers` loads from a directory."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    batch = tokenizer(texts, pairs, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    with torch.no_grad():
        return read_back(directory)(**batch).logits.numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_export_reads_back_in_transformers(family, tmp_path):
    """R57: `AutoModelForSequenceClassification` reads an export whole: every number, class and label name."""
    pair = source(family, tmp_path / "source")
    out = export(pair, tmp_path / "export")
    model = read_back(out)
    assert type(model).__name__ == f"{FAMILIES[family]}ForSequenceClassification"
    assert model.config.architectures == [type(model).__name__]
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model.config.label2id == {name: number for number, name in enumerate(LABELS)}
    assert model.config.problem_type == "single_label_classification"
    before = pair.reference.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_reading_back_sees_a_lost_tensor(tmp_path):
    """R57: negative control: an export without one of its tensors, or with one too many, is not read back whole."""
    pair = source("bert", tmp_path / "source")
    checkpoint = open_checkpoint(pair.directory)
    tensors = {name: checkpoint.read(name) for name in checkpoint.shapes}
    lost = {name: tensor for name, tensor in tensors.items() if name != "bert.pooler.dense.bias"}
    for number, wrong in enumerate((lost, {**tensors, "bert.more": np.zeros(2, np.float32)})):
        write_checkpoint(tmp_path / str(number), checkpoint.config, wrong)
        with pytest.raises(AssertionError):
            read_back(tmp_path / str(number))


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_read_back_in_transformers(name, tmp_path, record_property):
    """R57 C24: an exported decoder without a padding id classifies padded batches in `transformers`, logits equal."""
    reference = reference_model(name)
    reference.config.pad_token_id = None
    pair = paired(reference, tmp_path / "source")
    model = read_back(export(pair, tmp_path / "export"))
    assert model.config.architectures == [type(model).__name__]
    assert model.config.pad_token_id == reference.config.eos_token_id == 2
    model.config._attn_implementation = "eager"
    encoded = documents(model, 6)
    ours, theirs = our_logits(pair, several_a_row(encoded)), torch_logits(model, encoded)
    record_property("parity", f"{CASES[name][0]}|sequence_classification|export|{np.abs(ours - theirs).max():.1e}")
    assert np.abs(ours - theirs).max() < TOLERANCE


@pytest.mark.parametrize("name", [*DECODERS, "llama-tied-biases"])
def test_decoders_with_heads_on_the_vocabulary_read_back(name, tmp_path, record_property):
    """R57 C31: every tensor of an exported decoder is that of its source, tied embeddings stand there once."""
    pair = paired(reference_model(name, "causal_lm"), tmp_path / "source")
    task = build_task(SequenceClassification(kind="sequence_classification", labels=LABELS), {})
    task = dataclasses.replace(task, head=pair.model.head, to_hf=lambda: {"sft_jax_task": {}})
    config = open_checkpoint(pair.directory).config
    export_model(tmp_path / "export", pair.model, pair.params, About(config, task, pair.directory, LENGTH, "a card"))
    written = open_checkpoint(tmp_path / "export").shapes
    assert ("lm_head.weight" in written) != pair.reference.config.tie_word_embeddings
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()) and type(model) is type(pair.reference)
    assert model.config.architectures == [type(model).__name__]
    before = pair.reference.state_dict()
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    encoded = documents(model, 6)
    ours, theirs = our_logits(pair, several_a_row(encoded)), torch_logits(model.eval(), encoded)
    record_property("parity", f"{CASES[name][0]}|causal_lm|export|{gap(ours, theirs):.1e}")
    assert gap(ours, theirs) < rounded(model, lambda reference: torch_logits(reference, encoded), gap)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_the_export_are_those_of_transformers(family, tmp_path):
    """C7: `AutoTokenizer` on the export gives the ids and types that we train on, cut alike, for texts and pairs."""
    out = export(source(family, tmp_path / "source"), tmp_path / "export")
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    for pairs in (None, PAIRED):
        ours = tokenize(load_tokenizer(out), TEXTS, pairs, LENGTH)
        expected = theirs(TEXTS, pairs, truncation=True, max_length=LENGTH, return_token_type_ids=True)
        spans = [slice(*ours.offsets[i : i + 2]) for i in range(len(TEXTS))]
        assert [ours.fields["input_ids"][s].tolist() for s in spans] == expected["input_ids"]
        assert [ours.fields["token_type_ids"][s].tolist() for s in spans] == expected["token_type_ids"]
        assert max(map(len, expected["input_ids"])) == LENGTH, "nothing was cut"
        assert ours.truncated == sum(len(ids) > LENGTH for ids in theirs(TEXTS, pairs)["input_ids"])


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_tokenizers_without_a_fast_file(family, tmp_path):
    """C7: the files of old releases (`vocab.txt`; `vocab.json` and `merges.txt`) give the same ids as the fast file."""
    whole, old = tmp_path / "whole", tmp_path / "old"
    tokenizer = tokenizer_of(family)
    tokenizer.save_pretrained(whole)
    old.mkdir()
    (old / "config.json").write_text(json.dumps({"model_type": family}))
    model = json.loads((whole / "tokenizer.json").read_text())["model"]
    if family == "bert":
        (old / "vocab.txt").write_text("\n".join(sorted(model["vocab"], key=model["vocab"].get)) + "\n")
    else:
        (old / "vocab.json").write_text(json.dumps(model["vocab"]))
        (old / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    fast, slow = (tokenize(load_tokenizer(d), TEXTS, PAIRED, LENGTH) for d in (whole, old))
    for name in fast.fields:
        assert fast.fields[name].tolist() == slow.fields[name].tolist()


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
def test_prediction_from_the_export_is_that_of_transformers(family, tmp_path, record_property):
    """R57: from text to logits, our `predict` on an export agrees with `transformers` on it within 1e-4."""
    out = export(source(family, tmp_path / "source"), tmp_path / "export")
    records = list(load_predictor(str(out))(TEXTS, batch_size=3, raw=True))
    expected = reference_logits(out, TEXTS)
    gap = np.abs(np.asarray([r["logits"] for r in records]) - expected).max()
    record_property("parity", f"{family}|sequence_classification|export|{gap:.1e}")
    assert gap < TOLERANCE
    assert [r["label"] for r in records] == [LABELS[i] for i in expected.argmax(axis=1)]
    assert [list(r["scores"]) for r in records] == [LABELS] * len(TEXTS)


@pytest.mark.parametrize(
    "section",
    [
        MultiLabelClassification(kind="multi_label_classification", labels=LABELS),
        Regression(kind="regression", label="stars"),
    ],
    ids=lambda section: section.kind,
)
def test_exports_of_other_tasks_are_used_alike(section, tmp_path):
    """R57: several labels and a number: what `transformers` and its pipeline make of an export, `predict` does."""
    pair = source("bert", tmp_path / "source", 1 if section.kind == "regression" else len(LABELS))
    out = export(pair, tmp_path / "export", section)
    config = read_back(out).config
    names = ["stars"] if section.kind == "regression" else LABELS
    assert config.num_labels == len(names) and config.id2label == dict(enumerate(names))
    records = list(load_predictor(str(out))(TEXTS, batch_size=3, raw=True))
    assert np.abs(np.asarray([r["logits"] for r in records]) - reference_logits(out, TEXTS)).max() < TOLERANCE
    pipeline = transformers.pipeline("text-classification", model=str(out), device="cpu")
    for theirs, ours in zip(pipeline(TEXTS, top_k=None, truncation=True, max_length=LENGTH), records, strict=True):
        scores = ours.get("scores") or {"stars": ours["score"]}
        assert {entry["label"]: entry["score"] for entry in theirs} == pytest.approx(scores, abs=TOLERANCE)


def test_a_run_on_pairs_exports_what_transformers_reads(configure, tmp_path):
    """R57: after a real run on pairs of texts the exported model scores pairs as `transformers` does, within 1e-4."""
    from datasets import Dataset

    pair = source("bert", tmp_path / "source")
    rows = tmp_path / "pairs.jsonl"
    lines = [
        {"text": a, "other": b, "label": LABELS[i % 3]} for i, (a, b) in enumerate(zip(TEXTS, PAIRED, strict=True))
    ]
    rows.write_text("\n".join(json.dumps(line) for line in lines))
    settings = (f"model.source={pair.directory}", "model.head=new", "task.text_pair=other", f"data.max_length={LENGTH}")
    files = [f"data.source.{split}={rows}" for split in ("train", "validation", "test")]
    result = train(prepare(configure(*settings, *files, "train.steps=3", "eval.batch_size=4")))
    predictor = load_predictor(str(result.directory / "model"))
    found = [r["logits"] for r in predictor(Rows(Dataset.from_list(lines), "input"), raw=True)]
    expected = reference_logits(result.directory / "model", TEXTS, PAIRED)
    assert np.abs(np.asarray(found) - expected).max() < TOLERANCE
    assert read_back(result.directory / "model").config.id2label == dict(enumerate(sorted(LABELS)))
    other = Rows(Dataset.from_list([{**line, "other": "?"} for line in lines]), "input")
    alone = [r["logits"] for r in predictor(other, raw=True)]
    assert np.abs(np.asarray(alone) - expected).max() > TOLERANCE, "the second text changes nothing"


def test_transformers_reads_our_shards(tmp_path):
    """R57: an export over several files has an index that `transformers` reads, every tensor equal."""
    pair = source("distilbert", tmp_path / "source")
    checkpoint = open_checkpoint(pair.directory)
    tensors = {name: checkpoint.read(name) for name in checkpoint.shapes}
    write_checkpoint(tmp_path / "shards", checkpoint.config, tensors, shard_bytes=5000)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 3
    after = read_back(tmp_path / "shards").state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in pair.reference.state_dict().items())
