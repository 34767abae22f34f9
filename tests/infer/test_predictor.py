"""Offline prediction: records in the order of the inputs, whatever shares a batch with them, as evaluation has them."""

import jax
import numpy as np
import pytest
from conftest import WORDS, write_model
from datasets import Dataset

from sft_jax.data.batch import Shape
from sft_jax.data.loader import EvalBatches
from sft_jax.data.rows import Rows
from sft_jax.errors import DataError, ModelError
from sft_jax.infer.predict import Predictor, load_predictor
from sft_jax.models.family import build_model, load_model
from sft_jax.train.step import make_eval_step
from sft_jax.weights.files import open_checkpoint

LABELS = ("no", "perhaps", "yes")
CONFIG = {
    "architectures": ["BertForSequenceClassification"],
    "id2label": dict(enumerate(LABELS)),
    "sft_jax_task": {"kind": "sequence_classification", "text": "text", "text_pair": None, "max_length": 24},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory as `export` writes it: a random model of three labels."""
    return write_model(tmp_path_factory.mktemp("exported") / "model", CONFIG, seed=5, head=3)


@pytest.fixture(scope="module")
def predictor(model) -> Predictor:
    """That model, loaded."""
    return load_predictor(str(model))


def texts_of(count: int, seed: int = 0, longest: int = 16) -> list[str]:
    """Texts of very different lengths."""
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, size=int(draw.integers(1, longest)))) for _ in range(count)]


def rows_of(columns: dict[str, list]) -> Rows:
    """Rows with these columns, as `read_inputs` gives them."""
    return Rows(Dataset.from_dict(columns), "input")


def logits_of(predictor: Predictor, texts, batch_size: int = 8) -> np.ndarray:
    """The raw outputs for texts, in their order."""
    return np.array([record["logits"] for record in predictor(texts, batch_size, raw=True)])


def test_records_have_label_scores_and_no_more(predictor):
    """A record is the label and a probability for each; the logits come only when asked for."""
    (record,) = predictor(["bara bare"])
    assert set(record) == {"label", "scores"} and tuple(record["scores"]) == LABELS
    assert record["label"] == max(record["scores"], key=record["scores"].get)
    (raw,) = predictor(["bara bare"], raw=True)
    assert raw.pop("logits") and raw == record


def test_raw_logits_are_at_full_precision(predictor):
    """Raw logits are the float32 outputs to the last bit, of which the scores are the softmax."""
    (record,) = predictor(["cela doro fenum"], raw=True)
    logits = np.array(record["logits"])
    assert np.array_equal(logits, logits.astype(np.float32)) and len(logits) == 3
    odds = np.exp(logits - logits.max())
    assert list(record["scores"].values()) == pytest.approx(odds / odds.sum(), abs=1e-6)


def test_order_is_that_of_the_inputs_over_several_windows(predictor):
    """R40: more rows than a window holds, of all lengths and with repeats, come back in their order."""
    batch_size = 1
    texts = texts_of(64 * batch_size + 30, seed=1)
    texts[70] = texts[3]  # the same text in another window
    found = logits_of(predictor, texts, batch_size)
    assert len(found) == len(texts)
    backwards = logits_of(predictor, texts[::-1], 8)
    np.testing.assert_allclose(backwards[::-1], found, atol=1e-5)
    assert len({tuple(np.round(row, 4)) for row in found}) > 80, "different texts have different outputs"
    np.testing.assert_allclose(found[70], found[3], atol=1e-5)


def test_the_batch_size_changes_nothing(predictor):
    """R40: one row at a time, a few, or more than there are give the same outputs."""
    texts = texts_of(23, seed=2)
    alone = logits_of(predictor, texts, 1)
    for batch_size in (3, 8, 100):
        np.testing.assert_allclose(logits_of(predictor, texts, batch_size), alone, atol=1e-5)


def test_batch_peers_change_nothing(predictor):
    """R40, C3: a row has the same outputs alone, among others, and packed with others that change."""
    text = "hina jato kolum"
    alone = logits_of(predictor, [text])[0]
    for seed in range(4):
        peers = texts_of(11, seed)
        among = logits_of(predictor, [*peers[:seed], text, *peers[seed:]])
        np.testing.assert_allclose(among[seed], alone, atol=1e-5)


def test_predictions_equal_evaluation(model, predictor):
    """R40: loss and confusion matrix of the evaluation step are those of the predicted logits, rows packed or not."""
    texts = texts_of(41, seed=3)
    labels = np.random.default_rng(3).integers(0, 3, len(texts))
    checkpoint = open_checkpoint(model)
    built = build_model(checkpoint.config, predictor.task.head, "here")
    _, params = load_model(built, checkpoint)
    step = jax.jit(make_eval_step(built.template, predictor.task, groups=0, compute_dtype=np.dtype("float32")))
    encoded = predictor.task.encode([texts], labels.tolist(), predictor.tokenizer, predictor.max_length)

    logits = logits_of(predictor, texts)
    confusion = np.zeros((3, 3))
    np.add.at(confusion, (labels, logits.argmax(axis=1)), 1)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for like in (Shape(8, 24, 1), Shape(8, 40, 5)):
        batches = EvalBatches.of(encoded, like, 8, 1)
        tally = None
        for number in range(len(batches)):
            tally, outputs = step(params, {}, batches[number], tally)
            assert outputs.shape == (*batches[number]["weight"].shape, 3)
        assert tally is not None and np.array_equal(tally.all.confusion, confusion)
        loss = predictor.task.metrics(tally.all)["loss"]
        assert loss == pytest.approx(-log_probabilities[range(41), labels].mean(), rel=1e-5)


def test_rows_with_other_columns_are_predicted_by_their_text(predictor):
    """Columns besides the text, a label of any kind among them, change nothing; a record keeps the `id` of its row."""
    texts = texts_of(5, seed=4)
    rows, expected = {"name": [*"abcde"], "text": texts, "label": [9.5] * 5}, list(predictor(texts))
    assert list(predictor(rows_of(rows))) == expected
    named = list(predictor(rows_of({**rows, "id": [*"abcde"]}), batch_size=2))
    assert named == [{"id": name, **record} for name, record in zip("abcde", expected, strict=True)]


def test_long_texts_are_cut_as_in_training(predictor):
    """C7: words past the length that the model was trained with have no influence, those before it have."""
    assert predictor.max_length == 24
    words = (WORDS * 2)[:60]
    one, longer = logits_of(predictor, [" ".join(words[:22])]), logits_of(predictor, [" ".join(words)])
    np.testing.assert_allclose(one, longer, atol=1e-5)
    shorter = logits_of(predictor, [" ".join(words[:21])])
    assert np.abs(one - shorter).max() > 1e-3


def test_texts_are_cleaned_as_in_training(tmp_path):
    """C7: what was done to the texts of training is done to those of prediction, by the word of `config.json`."""
    rules = {"html": True, "unicode": "NFKC", "whitespace": True}
    task = {**CONFIG["sft_jax_task"], "clean": rules}
    cleaning = load_predictor(str(write_model(tmp_path / "clean", {**CONFIG, "sft_jax_task": task}, seed=5, head=3)))
    plain = load_predictor(str(write_model(tmp_path / "plain", CONFIG, seed=5, head=3)))
    dirty, text = "  <p>ｂara</p><br/>cel&#117;m\n dora ", "bara celum dora"
    assert np.array_equal(logits_of(cleaning, [dirty]), logits_of(plain, [text]))
    assert not np.array_equal(logits_of(plain, [dirty]), logits_of(plain, [text]))
    assert len(list(cleaning(["<br>"]))) == 1, "nothing is left of the text, and a row has its record all the same"


@pytest.mark.parametrize("clean", [5, [], {"html": "yes"}, {"lower": True}, {"min_chars": 0}])
def test_rules_that_are_none_are_refused(clean, tmp_path):
    """R33: a `config.json` that asks for cleaning in words of its own is one clear line."""
    task = {**CONFIG["sft_jax_task"], "clean": clean}
    with pytest.raises(ModelError, match=r"sft_jax_task\.clean of its config\.json is no set of rules; export"):
        load_predictor(str(write_model(tmp_path / "odd", {**CONFIG, "sft_jax_task": task}, head=3)))


def test_nothing_in_gives_nothing_out(predictor):
    """No rows give no records and no error."""
    assert list(predictor([])) == []
    assert list(predictor(rows_of({"text": []}))) == []


@pytest.mark.parametrize("text", ["漢字かな", "🎉🎉", "Ünïcödé", "a\u2028b", "bara\nbare", "[SEP]", "x" * 5000])
def test_any_text_is_predicted(text, predictor):
    """Every script, line breaks within a text and very long words give one record each."""
    records = list(predictor([text, "bara"]))
    assert len(records) == 2
    assert all(sum(record["scores"].values()) == pytest.approx(1, abs=1e-5) for record in records)


def test_an_empty_text_is_named_by_its_row(predictor):
    """A row without a text is an error that names it, before anything is predicted."""
    with pytest.raises(DataError) as caught:
        next(predictor(["bara", "  "]))
    assert str(caught.value) == "input: 1 problem\n  - row 2: text is '  ', expected a text"


def test_pairs_are_predicted_as_pairs(tmp_path):
    """A model of two texts reads both columns, and rows without the second are refused."""
    task = {**CONFIG["sft_jax_task"], "text": "premise", "text_pair": "hypothesis"}
    directory = write_model(tmp_path / "pairs", {**CONFIG, "sft_jax_task": task}, seed=6, head=3)
    predictor = load_predictor(str(directory))
    premises, hypotheses = texts_of(6, 5, 8), texts_of(6, 6, 8)
    rows = rows_of({"hypothesis": hypotheses, "premise": premises})
    swapped = rows_of({"hypothesis": premises, "premise": hypotheses})
    assert np.abs(logits_of(predictor, rows) - logits_of(predictor, swapped)).max() > 1e-3
    with pytest.raises(DataError, match="no column 'hypothesis'; the rows have: premise"):
        next(predictor(premises))


@pytest.mark.parametrize(
    ("problem", "names"), [("multi_label_classification", {"0": "a", "1": "b"}), ("regression", {"0": "LABEL_0"})]
)
def test_models_of_other_problems_that_others_trained(tmp_path, problem, names):
    """By the kind of problem in its `config.json`, a foreign model gives several labels or a number."""
    config = {"architectures": ["BertForSequenceClassification"], "problem_type": problem, "id2label": names}
    predictor = load_predictor(str(write_model(tmp_path / "foreign", config, head=len(names))))
    (record,) = predictor(["bara bare"], raw=True)
    logits = record.pop("logits")
    if problem == "regression":
        assert record == {"score": logits[0]}
    else:
        assert record["labels"] == [name for name, logit in zip("ab", logits, strict=True) if logit >= 0]
        assert list(record["scores"].values()) == pytest.approx([1 / (1 + np.exp(-x)) for x in logits], abs=1e-6)


def test_a_model_that_others_trained_is_loaded(tmp_path):
    """Without a word from us in its `config.json`, labels, column and length have their plain values."""
    config = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0", "1": "LABEL_1"}}
    predictor = load_predictor(str(write_model(tmp_path / "foreign", config, head=2)))
    assert predictor.task.labels == ("LABEL_0", "LABEL_1")
    assert predictor.max_length == 48, "no more than the model has positions for"
    assert len(list(predictor(texts_of(3)))) == 3


def test_a_model_without_a_head_is_refused(tmp_path, tiny):
    """C17: a head that was never trained is not made up at random."""
    with pytest.raises(ModelError, match="names no task that is known"):
        load_predictor(str(tiny))
    directory = write_model(tmp_path / "headless", CONFIG)
    with pytest.raises(DataError, match=r"holds no head for sequence_classification \(head/.* missing\); fine-tune it"):
        load_predictor(str(directory))
