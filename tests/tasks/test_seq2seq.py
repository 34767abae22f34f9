"""The task on pairs of texts: what is learned, what its files say of answers, and whole tiny runs of it."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ONE_SHAPE
from datasets import Dataset
from safetensors.numpy import load_file
from translations import pairs, write_marian, write_pairs, write_t5

from sft_jax import jobs, run
from sft_jax.config.generation import Rules
from sft_jax.config.tasks import Seq2Seq
from sft_jax.data.rows import numbered
from sft_jax.data.text import TextTokenizer, load_tokenizer
from sft_jax.errors import ConfigError, DataError, ModelError
from sft_jax.infer.predict import load_predictor, read_inputs
from sft_jax.tasks import seq2seq
from sft_jax.tasks.task import Examples, build_task, restore_task

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a Marian, a T5, and pairs for each split."""
    home = tmp_path_factory.mktemp("seq2seq")
    write_marian(home / "marian")
    write_t5(home / "t5")
    for seed, (split, count) in enumerate(zip(SPLITS, (96, 12, 14), strict=True)):
        write_pairs(home / f"{split}.jsonl", count, seed)
    return home


@pytest.fixture
def prepared(configure, home):
    """`prepared("t5", "key=value", ...)`: a run on the pairs."""

    def make(model: str, *overrides: str) -> run.Run:
        files = (f"data.source.{split}={home / split}.jsonl" for split in SPLITS)
        short = ("task.generate.max_new_tokens=9", "eval.answers=8", "eval.best_metric=loss")
        return run.prepare(configure(f"model.source={home / model}", "task.kind=seq2seq", *files, *short, *overrides))

    return make


@pytest.mark.parametrize(("model", "prefix"), [("marian", ""), ("t5", "bara ")])
def test_a_whole_run(model, prefix, prepared, tmp_path):
    """C5 C31 R57: translations are learned and scored, and an export answers as the run did, on texts and on rows."""
    settings = (
        f"task.prefix='{prefix}'",
        "train.epochs=12",
        "optim.lr=2e-2",
        "eval.baselines=true",
        "eval.every=never",
    )
    built = prepared(model, *settings, ONE_SHAPE)
    assert built.audit and built.audit.facts["stop"].startswith("96 of 96 answers end with </s>")
    shown = built.audit.rows[0]
    assert shown[0][0].startswith(prefix) and [learned for _, learned in shown] == [False, False, True]
    result = jobs.train(built)
    assert result.test and result.test.metrics.keys() == set(built.task.metric_names)
    assert result.baselines.keys() == {"the source as it is", "word by word"}
    lines = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < losses[0] / 2

    out = result.directory / "model"
    held = load_file(out / "model.safetensors")
    assert sum("embed" in name or "shared" in name or "lm_head" in name for name in held) == 1, "one tied tensor (C31)"
    predictor = load_predictor(str(out))
    records = list(predictor(built.rows["test"].rows))
    assert [record["id"] for record in records] == list(range(14))
    assert sum(record["stopped"] for record in records) > 7
    scores = built.task.answer_metrics([r["answer"] for r in records[:8]], built.rows["test"].targets[:8])
    assert scores["chrf"] == pytest.approx(result.test.metrics["chrf"])
    (tmp_path / "lines.txt").write_text("".join(text + "\n" for text in built.rows["test"].texts[0]))
    again = list(predictor(read_inputs(str(tmp_path / "lines.txt"), predictor.task)))
    assert [r["answer"] for r in again] == [r["answer"] for r in records]


def test_validations_are_answered(prepared):
    """C18: the best step may be picked by a score of answers; samples are the first of those that were scored."""
    built = prepared("t5", "train.steps=3", "eval.every=2", "eval.best_metric=chrf", "eval.samples=2", ONE_SHAPE)
    result = jobs.train(built)
    assert 0 <= result.validation["chrf"] <= 100 and "bleu" in result.validation
    samples = [json.loads(line) for line in (result.directory / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [2, 2, 3, 3]
    assert samples[0]["prompt"] == built.rows["validation"].texts[0][0]
    again, _ = jobs.evaluate(run.open_run(result.directory), "validation")
    assert again.metrics["chrf"] == pytest.approx(result.validation["chrf"])


def test_scores_of_answers_need_answers(prepared):
    """C18: without answers nothing can be picked by a score of them, which is said before anything is read."""
    with pytest.raises(ConfigError, match=r"eval.answers: 0, but the best step is picked by chrf, which is of answers"):
        prepared("t5", "eval.answers=0", "eval.best_metric=null")
    built = prepared("t5", "eval.answers=0")
    assert jobs.answers_to(built, "test") is None


def test_packed_pairs_are_those_of_padded_rows(prepared):
    """R17: whatever the layout, a step has the loss of the same pairs."""
    losses = []
    for layout in ("packed", "bucketed", "padded"):
        built = prepared("t5", "task.target=twice", f"data.layout.kind={layout}")
        state, _ = run.initial(built)
        module, batch = built.model.template.bind(state.weights), built.batches[0]
        losses.append(float(built.task.loss(module(batch), batch).value))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) == pytest.approx(losses[2], rel=1e-5)


def test_columns_may_be_nested():
    """C25: `translation.en` is the `en` of what a column holds; one that lacks it is named with place and value."""
    task = build_task(Seq2Seq(kind="seq2seq", source="translation.en", target="translation.fr"), {})
    table = [{"translation": {"en": "a", "fr": "b"}}, {"translation": {"en": "c", "fr": None}}]
    rows = numbered(Dataset.from_list(table), "data.train")
    assert task.read(rows) == ((["a", "c"],), {})
    found = task.targets(rows)
    assert found.values == ["b", None] and found.bad[1].text == "translation.fr is None, expected a text"
    with pytest.raises(DataError, match=r"no column 'pair.en'; the rows have: translation"):
        build_task(Seq2Seq(kind="seq2seq", source="pair.en"), {}).read(rows)


def test_models_that_others_trained(home):
    """R57: a translator of others answers as its files say it searches; a summariser is of the same kind."""
    config = json.loads((home / "marian" / "config.json").read_text())
    task = restore_task({**config, "num_beams": 4, "length_penalty": 0.8, "early_stopping": None}, "here")
    assert task.kind == "seq2seq" and task.generation
    assert (task.generation.num_beams, task.generation.length_penalty) == (4, 0.8)
    assert restore_task(json.loads((home / "t5" / "config.json").read_text()), "here").kind == "seq2seq"
    records = list(load_predictor(str(home / "marian"), ["num_beams=2", "max_new_tokens=5"])(["This is a test."]))
    assert len(records) == 1 and records[0]["answer"] is not None and records[0]["tokens"] <= 5
    with pytest.raises(ConfigError, match=r"--score: seq2seq scores answers where rows have targets"):
        list(load_predictor(str(home / "marian"))(["bara"], score=True))


@pytest.mark.parametrize(
    ("said", "rules"),
    [
        ({}, Rules()),
        ({"bad_words_ids": [[5], [6]], "forced_eos_token_id": 0}, Rules(banned=(5, 6), last=0)),
        ({"forced_bos_token_id": [7], "min_length": 4, "repetition_penalty": 1.0}, Rules(first=7, least=3)),
        ({"min_new_tokens": 9, "min_length": 4, "no_repeat_ngram_size": None}, Rules(least=9)),
    ],
)
def test_rules_are_read(said, rules):
    """R57: what a `generation_config.json` says of where tokens may stand, and what changes nothing."""
    assert seq2seq.rules(TextTokenizer(None, answers=said)) == rules


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2 is not supported; take it out"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size=3 is not supported"),
        ({"bad_words_ids": [[1, 2]]}, r"bad_words_ids is \[\[1, 2\]\], expected lists of one token each"),
        ({"bad_words_ids": [["a"]]}, r"bad_words_ids is \['a'\], expected tokens by their numbers"),
        ({"forced_eos_token_id": [1, 2]}, r"forced_eos_token_id is \[1, 2\]; only one token is supported"),
        ({"min_length": -1}, "min_length is -1, expected a number of tokens"),
    ],
)
def test_rules_that_are_not_kept_are_refused(said, text):
    """C26: what would change answers and is not computed is an error that names it."""
    with pytest.raises(ModelError, match=f"generation_config.json: {text}"):
        seq2seq.rules(TextTokenizer(None, answers=said))


def test_an_export_says_how_it_answers(home, tmp_path):
    """C5: where answers begin, end, and what they may not hold stands in the file that `transformers` reads."""
    task = build_task(Seq2Seq(kind="seq2seq"), {})
    said = json.loads(task.files(home / "marian")["generation_config.json"])
    config = json.loads((home / "marian" / "config.json").read_text())
    assert said == {name: config[name] for name in said}
    assert {"decoder_start_token_id", "eos_token_id", "forced_eos_token_id", "bad_words_ids"} <= said.keys()


def test_targets_that_are_all_cut_stop_the_run(prepared):
    """C5 C7: where no target reaches its end nobody would learn to stop, and the audit says so."""
    with pytest.raises(DataError, match=r"no answer ends with a token that stops generation \(</s>\)"):
        prepared("t5", "task.max_target_length=1")


def test_what_is_too_long_for_the_model_is_named(prepared):
    """C9: targets and answers that the model has no positions for are refused before anything is trained."""
    with pytest.raises(ConfigError, match=r"task.max_target_length: a target has 60 tokens, but .* positions for 48"):
        prepared("marian", "task.target=long", "task.max_target_length=60")
    built = prepared("marian", "task.generate.max_new_tokens=48")
    with pytest.raises(
        ConfigError, match=r"its first token and an answer of 48 are more than the model's 48 positions"
    ):
        jobs.train(built)


def test_baselines_are_of_the_rows_that_are_answered(home):
    """What needs no model is scored by the same measure; a word table beats copying where words are translated."""
    tokenizer, task = load_tokenizer(home / "t5"), build_task(Seq2Seq(kind="seq2seq"), {})
    train, test = (Examples(task.encode([s], t, tokenizer, 20), (list(s),), list(t)) for s, t in
                   (zip(*pairs(count, seed), strict=True) for count, seed in ((200, 0), (12, 1))))  # fmt: skip
    found = task.baselines(train, test.select(np.arange(6)))
    assert 0 < found["the source as it is"] < found["word by word"] < 100
    assert found != task.baselines(train, test)
