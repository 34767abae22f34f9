"""Whole tiny runs of causal language models: trained, counted, exported, audited, and told to stop."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from chats import GPT2, LLAMA, QWEN3, said, write_decoder, write_talks
from conftest import ONE_SHAPE
from rich.console import Console
from safetensors.numpy import load_file

from sft_jax import inputs, jobs, run
from sft_jax.console import show_audit, show_data
from sft_jax.data.text import load_tokenizer
from sft_jax.errors import ConfigError, DataError
from sft_jax.infer.predict import load_predictor
from sft_jax.report import audit
from sft_jax.scores import score_files
from sft_jax.tasks.task import Audit

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Conversations whose answers can be learned, as overrides that name the files."""
    home = tmp_path_factory.mktemp("talks")
    files = [write_talks(home / f"{split}.jsonl", count, seed) for seed, (split, count) in
             enumerate(zip(SPLITS, (48, 12, 14), strict=True))]  # fmt: skip
    return [f"data.source.{split}={file}" for split, file in zip(SPLITS, files, strict=True)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny GPT-2 with tied embeddings, and a tiny Llama without, of two families of templates."""
    home = tmp_path_factory.mktemp("decoders")
    return {"gpt2": write_decoder(home / "gpt2", GPT2), "llama": write_decoder(home / "llama", LLAMA, "llama3")}


@pytest.fixture
def prepared(configure, talks, models):
    """`prepared("gpt2", "key=value", ...)`: a run on the conversations."""

    def make(model: str, *overrides: str) -> run.Run:
        base = (f"model.source={models[model]}", *talks, "task.kind=causal_lm", "data.max_length=128")
        return run.prepare(configure(*base, *overrides))

    return make


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_a_whole_run(model, prepared):
    """C5, C31, R57: answers are learned and beat the commonest token; an export has their stops, one tied tensor."""
    settings = ("task.format=chat", "train.epochs=10", "optim.lr=2e-2", "eval.best_metric=loss", "eval.baselines=true")
    built = prepared(model, *settings, ONE_SHAPE)
    result = jobs.train(built)
    assert result.test is not None and result.test.metrics["token_accuracy"] > result.baselines["commonest token"]
    lines = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < losses[0] / 3
    again, _ = jobs.evaluate(run.open_run(result.directory), "test")
    assert again.metrics == pytest.approx(result.test.metrics, rel=1e-5)

    home = result.directory / "model"
    tokenizer, stops = load_tokenizer(home), json.loads((home / "generation_config.json").read_text())["eos_token_id"]
    assert (
        stops == built.task.stops(tokenizer)
        and tokenizer.template == load_tokenizer(built.checkpoint.directory).template
    )
    learned, label = (built.data["train"].tokens[name] for name in ("token_weight", "label"))
    last = label[(learned > 0) & ~np.append(learned[1:] > 0, False)]
    assert np.isin(last, stops).all() and len(last) > 48
    names = load_file(home / "model.safetensors")
    assert ("lm_head.weight" in names) == (model == "llama"), "a tied head is no second tensor (C31)"
    predictor = load_predictor(str(home))
    records = list(predictor(built.rows["test"].rows, score=True))
    assert len(records) == 14 and all(np.isfinite(record["loss"]) and record["tokens"] > 1 for record in records)
    answers = list(predictor(built.rows["test"].rows))
    assert len(answers) == 14 and all(record["stopped"] for record in answers), "it was overfit, and stops (C5)"
    samples = [json.loads(line) for line in (result.directory / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 30 and samples[-1]["step"] == result.steps and samples[-1]["stopped"]
    review = json.loads((result.directory / "review.json").read_text())
    assert review["rows"] == 14 and "report.html" in [file.name for file in result.directory.iterdir()]
    assert "pipeline_tag: text-generation" in (home / "README.md").read_text()


def test_a_run_in_transformers(prepared):
    """C31, C5: after training one tensor of a tied model, `transformers` reloads it with equal logits and stops."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    built = prepared("gpt2", "task.format=chat", "train.steps=2", "train.freeze=['blocks/**', 'norm/**']", ONE_SHAPE,
                     "eval.every=never")  # fmt: skip
    assert sorted(built.trainable) == ["embed/position/embedding", "embed/word/embedding"]
    home = jobs.train(built).directory / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(str(home)).eval()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.generation_config.eos_token_id == built.task.stops(load_tokenizer(home))
    ids = built.data["test"].tokens["input_ids"][: built.data["test"].offsets[1]]
    segments, positions = np.ones((1, len(ids)), np.int32), np.arange(len(ids), dtype=np.int32)[None]
    loaded = load_predictor(str(home))
    assert loaded.task.kind == "causal_lm"
    from sft_jax.models.family import build_model, load_model
    from sft_jax.weights.files import open_checkpoint

    checkpoint = open_checkpoint(home)
    ours = build_model(checkpoint.config, built.task.head, "here")
    params = load_model(ours, checkpoint)[1]
    batch = {"input_ids": ids[None], "segment_ids": segments, "position_ids": positions}
    dense = np.asarray(ours.template.bind(params)(batch).dense())
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids[None].astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(dense, theirs, atol=1e-5)


def test_batches_are_found_at_once(prepared):
    """C12, R17: the batch of a late step is that of a walk to it, and packed rows hold each token of it once."""
    built = prepared("gpt2", "task.format=chat", "train.epochs=4", "data.layout.length=256")
    late = built.batches[len(built.batches) - 2]
    assert late["segment_ids"].max() > 1, "several documents in a row"
    chosen = np.sort(late["index"][late["index"] >= 0])
    again = prepared("gpt2", "task.format=chat", "train.epochs=4", "data.layout.kind=padded").batches
    assert np.array_equal(np.sort(again[len(again) - 2]["index"][:, 0]), chosen)
    encoded = built.data["train"]
    expected = encoded.tokens["label"][encoded.places(chosen)]
    found = late["label"][late["segment_ids"] > 0]
    assert np.array_equal(np.sort(found), np.sort(expected))
    assert late["token_weight"].sum() == encoded.tokens["token_weight"][encoded.places(chosen)].sum()


def test_rows_of_several_documents_are_scored(prepared, tmp_path):
    """C7: with a template that rewrites earlier turns, a run has more documents than rows, and reviews rows."""
    (tmp_path / "qwen.jinja").write_text(QWEN3)
    settings = ("task.format=chat", f"task.template={tmp_path / 'qwen.jinja'}", "train.steps=2", ONE_SHAPE)
    built = prepared("gpt2", *settings, "eval.every=never")
    assert len(built.data["test"]) > len(built.rows["test"]) == 14
    result = jobs.train(built)
    assert load_tokenizer(result.directory / "model").template == QWEN3
    records = list(load_predictor(str(result.directory / "model"))(built.rows["test"].rows, score=True))
    assert len(records) == 14


def test_what_is_lost_is_reported(configure, models, tmp_path):
    """C9: rows that are cut before their answers are counted in the report; more than half, or all, is an error."""
    file = tmp_path / "long.jsonl"

    def prepare(*lengths: int) -> run.Run:
        rows = [{"prompt": "a" * n, "completion": "b" * 3} for n in lengths]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources = (f"data.source.train={file}", "data.source.validation=null", "data.source.test=null")
        task = ("task.kind=causal_lm", "task.format=completion", "eval.every=never", "data.max_length=32")
        return run.prepare(configure(f"model.source={models['gpt2']}", *sources, *task))

    tokens = prepare(5, 6, 7, 40).report.splits["train"].tokens
    assert tokens is not None and tokens.lost == {"cut before its answer": 1} and tokens.supervised == 12
    console = Console(width=200, record=True, file=io.StringIO())
    show_data(console, prepare(5, 6, 7, 40).report)
    assert "cut before its answer" in console.export_text()
    with pytest.raises(DataError, match=r"of 4 rows only 1 made a document \(cut before its answer: 3\); raise max_le"):
        prepare(5, 40, 41, 42)
    with pytest.raises(DataError, match=r"data\.train: of 2 rows none made a document \(cut before its answer: 2\)"):
        prepare(40, 41)


def test_the_audit_stops_a_run(configure, models, tmp_path):
    """C5: a run whose answers never end with a stop token is refused before step 0, with the remedy."""
    file = tmp_path / "talks.jsonl"
    file.write_text(json.dumps({"messages": [said("user", "a"), said("assistant", "b" * 300)]}) + "\n")
    sources = (f"data.source.train={file}", "data.source.validation=null", "data.source.test=null")
    task = ("task.kind=causal_lm", "task.format=chat", "eval.every=never", "data.max_length=64")
    with pytest.raises(DataError) as caught:
        run.prepare(configure(f"model.source={models['gpt2']}", *sources, *task))
    assert str(caught.value) == (
        "data.train: the audit of what is supervised: 1 problem\n"
        "  - no answer ends with a token that stops generation (<|im_end|>), so the model would never stop; "
        "every document is cut before its end: raise data.max_length"
    )


def test_the_audit_is_shown():
    """What is supervised stands in green, or in brackets where there are no colours; a line break is no line break."""
    audit = Audit([[("user: a\n\x1b[2J", False), ("[b]!", True)]], {"supervised": "half"}, [])
    plain, coloured = (
        Console(width=80, record=True, file=io.StringIO(), force_terminal=on, highlight=False) for on in (False, True)
    )
    show_audit(plain, audit)
    assert "user: a⏎\\x1b[2J⟦[b]!⟧" in plain.export_text()
    show_audit(coloured, audit)
    assert "⟦" not in coloured.export_text(clear=False) and "\x1b[32m[b]!" in coloured.export_text(styles=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.clean.whitespace=true", "data.clean.whitespace: causal_lm needs texts as they are written"),
        ("data.augment.swap=0.1", "data.augment: causal_lm needs tokens where they are"),
    ],
)
def test_texts_and_tokens_stay(override, message, prepared):
    """Prompts are not cleaned where completions are not, and tokens are not moved; plain texts may be cleaned."""
    with pytest.raises(ConfigError, match=message):
        prepared("gpt2", "task.format=completion", override)
    if "clean" in override:
        prepared("gpt2", override)


HOLLOW = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
HOLLOW += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.fixture
def calling(configure, models, tmp_path):
    """`calling("key=value", ...)`: a run on chats of which one in four is a call that the template does not write."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "w", "arguments": {}}}]}
    talks = [[said("user", f"a{n}"), call if n % 4 == 0 else said("assistant", "b")] for n in range(8)]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    (tmp_path / "hollow.jinja").write_text(HOLLOW)
    base = [f"model.source={models['gpt2']}", "task.kind=causal_lm", f"task.template={tmp_path / 'hollow.jinja'}"]
    base += [f"data.source.train={file}", f"data.source.validation={file}", "data.source.test=null"]
    base += ["data.max_length=128", "data.leakage=keep", "eval.best_metric=loss", "train.steps=1", ONE_SHAPE]
    return lambda *overrides: configure(*base, *overrides)


def test_rows_that_a_template_loses_obey_bad_rows(calling):
    """What a template writes nothing of is named by file and line, and stops a run unless bad rows are dropped; then
    it is in the report, and a sample of the first rows does not end the run."""
    with pytest.raises(DataError) as error:
        run.prepare(calling())
    text = str(error.value)
    assert "data.train: 2 of 8 rows become no documents" in text and "chats.jsonl, line 5: the template writes" in text
    assert "task.template" in text and "task.loss_on=last" in text and "data.bad_rows=drop" in text
    with pytest.raises(DataError, match="2 of 8 rows become no documents"):
        run.prepare(calling("data.bad_rows=drop"))
    built = run.prepare(calling("data.bad_rows=drop", "data.most_bad=0.3"))
    found = built.report.splits["train"]
    assert found.tokens is not None and found.tokens.lost == {"the template writes nothing of its answer": 2}
    (places,) = [v for k, v in found.examples.items() if k.startswith("the template writes")]
    assert [place.rpartition("/")[2] for place in places] == ["chats.jsonl, line 1", "chats.jsonl, line 5"]
    result = jobs.train(built)
    samples = [json.loads(line) for line in (result.directory / "samples.jsonl").read_text().splitlines()]
    assert [sample["prompt"] for sample in samples] == ["a1", "a2", "a3"], "what the user said, and of rows there are"
    scored = score_files(str(result.directory), [str(Path(str(built.config.data.source.train)))], {}, drop=True)
    assert len(scored.examples.encoded) == 6, "a format that columns told is that of the run's model"
    page = (result.directory / "report.html").read_text()
    assert "<mark>b&lt;|im_end|&gt;</mark>" in page and "chats.jsonl, line 2" in page and ">a1</th>" in page
    assert "share of documents of which every learned token is the likeliest" in page


def test_what_is_supervised_is_saved(calling, tmp_path):
    """C4: the audit as JSON lines and as a page has each row, where it stands, its tokens and their weights."""
    config = calling("data.bad_rows=drop", "data.most_bad=1")
    records = list(inputs.audit_data(config, "train", range(1, 6)))
    assert [record["row"] for record in records] == [2, 3, 4, 6] and records[3]["place"].endswith("chats.jsonl, line 6")
    assert records[0]["pieces"][-1][:2] == ["b<|im_end|>", 1.0]
    assert [token["text"] for token in records[0]["tokens"] if token["weight"]] == ["b", "<|im_end|>"]
    assert audit.write_lines(records, tmp_path / "a.jsonl") == 4 and audit.read_lines(tmp_path / "a.jsonl") == records
    assert audit.write_page(records, tmp_path / "a.html", "a < b") == 4
    page = (tmp_path / "a.html").read_text()
    assert "a &lt; b" in page and page.count("<mark>") == 4 and "<|im_end|>" not in page
    with pytest.raises(ConfigError, match=r"--split test: the rows have train, validation"):
        next(inputs.audit_data(config, "test"))
