"""Question answering: rows, windows, the loss of packed windows, and the official figures, each beside a naive twin."""

import collections
import itertools
import json
import re
import string
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ONE_SHAPE, SMALL, WORDS, questions, write_model, write_questions, write_tokenizer
from datasets import Dataset

from sft_jax import jobs, run
from sft_jax.config.tasks import QuestionAnswering
from sft_jax.data import contexts
from sft_jax.data.batch import Encoded, Shape, collate, lay_out, slots_for
from sft_jax.data.rows import Rows
from sft_jax.data.text import load_tokenizer
from sft_jax.errors import ConfigError, DataError
from sft_jax.infer.predict import load_predictor
from sft_jax.models.family import Head, build_model
from sft_jax.tasks import spans, squad
from sft_jax.tasks.question_answering import divergence, loss
from sft_jax.tasks.task import Examples, build_task, restore_task

TEXT = "bara cela dora fena gula hina jata kola bare cele dore fene gule hine jate kole"
TINY_BERT = {
    "vocab_size": 45, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 48, "type_vocab_size": 2, "pad_token_id": 0,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2,
}  # fmt: skip
SIZES = {"train": 120, "validation": 21, "test": 23}  # rows of a whole run
SECTION = QuestionAnswering(kind="question_answering", stride=3, no_answer=True, n_best=5, max_answer_tokens=4)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The tokenizer over WORDS."""
    home = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(home)
    return load_tokenizer(home)


def examples_of(tokenizer, count: int = 12, seed: int = 0, max_length: int = 16, section=SECTION) -> Examples:
    """Windows of made rows."""
    asked, texts, answers = questions(count, seed)
    encoded = build_task(section, {}).encode((asked, texts), answers, tokenizer, max_length)
    return Examples(encoded, (asked, texts), answers)


def random_logits(encoded: Encoded, seed: int = 0) -> np.ndarray:
    """Logits of all tokens."""
    return np.random.default_rng(seed).normal(size=(int(encoded.offsets[-1]), 2)).astype(np.float32)


# Rows.


def rows_of(**columns) -> Rows:
    """Rows with these columns."""
    return Rows(Dataset.from_dict(columns), "data.source.train")


@pytest.mark.parametrize(
    ("answers", "value"),
    [
        ({"text": ["cela"], "answer_start": [5]}, ((5, "cela"),)),
        ({"text": "cela", "answer_start": 5}, ((5, "cela"),)),
        (
            [{"text": "cela", "answer_start": 5}, {"text": "cela dora", "answer_start": 5}],
            ((5, "cela"), (5, "cela dora")),
        ),
        ({"text": [], "answer_start": []}, ()),
        (None, ()),
        ("{'text': ['cela'], 'answer_start': [5]}", ((5, "cela"),)),
        ("{'text': array(['cela'], dtype=object), 'answer_start': array([5], dtype=int32)}", ((5, "cela"),)),
        ('[{"text": "cela", "answer_start": 5}]', ((5, "cela"),)),
    ],
)
def test_forms_of_answers(answers, value):
    """S5, K: answers as `datasets` has them, as a list of objects, one alone, none, and as cells of a CSV have them."""
    task = build_task(SECTION, {})
    found = task.targets(rows_of(question=["bara"], context=[TEXT], answers=[answers]))
    assert found.values == [value] and not found.bad


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"text": ["cela"], "answer_start": [4]}, "context[4:] is ' cel', expected 'cela'; it stands at 5"),
        ({"text": ["cela"], "answer_start": [-1]}, "context[-1:] is '', expected 'cela'; it stands at 5"),
        ({"text": ["cela"], "answer_start": [900]}, "context[900:] is '', expected 'cela'"),
        (
            {"text": [" "], "answer_start": [4]},
            "an answer is ' ', expected a text; a row without an answer has an empty",
        ),
        ({"text": [], "answer_start": []}, "answers holds no answer; with task.no_answer=true rows may be without one"),
        ({"text": ["cela"], "answer_start": []}, "expected {'text': [...], 'answer_start': [...]}"),
        ("cela", "answers is 'cela', expected {'text': [...], 'answer_start': [...]}"),
        ("{'text': ['cela' ...]}", "it was cut with '...' when it was written, so that the rest is lost"),
    ],
)
def test_answers_that_cannot_be_used(answers, message):
    """C25: an answer that does not stand where it says, or is of another form, is named with place, value, remedy."""
    task = build_task(QuestionAnswering(kind="question_answering"), {})
    found = task.targets(rows_of(question=["bara"], context=[TEXT], answers=[answers]))
    assert found.values == [None] and found.bad[0].place == "row 1" and message in found.bad[0].text


def test_answers_as_texts_are_found():
    """S5: a plain answer is found where it stands once; one that stands twice, or nowhere, is named."""
    task = build_task(SECTION.model_copy(update={"answer_text": "said", "no_answer": False}), {})
    said = ["dora", "a", "xyz", ""]
    found = task.targets(rows_of(question=["bara"] * 4, context=[TEXT] * 4, said=said))
    assert found.values == [((10, "dora"),), None, None, None]
    texts = [bad.text for bad in found.bad.values()]
    assert "'a' stands more than once in context" in texts[0] and "'xyz' stands nowhere in context" in texts[1]
    assert "task.no_answer=true" in texts[2]


# Windows.


@pytest.mark.parametrize(("max_length", "stride"), [(12, 0), (12, 3), (16, 5), (48, 3)])
def test_windows_are_those_of_the_tokenizer(tokenizer, max_length, stride):
    """S5: every window has the whole question, all of the context stands in them, and the overlap is the stride."""
    asked, texts, _ = questions(9)
    found = contexts.tokenize_contexts(tokenizer, asked, texts, max_length, stride, cut=False)
    for row, text in enumerate(texts):
        windows = np.flatnonzero(found.rows == row)
        spans_of = []
        for window in windows:
            own = slice(found.offsets[window], found.offsets[window + 1])
            assert own.stop - own.start <= max_length and found.tokens["input_ids"][own][0] == 2
            begin, end = found.beside["begin"][own], found.beside["end"][own]
            inside = begin >= 0
            assert (end[inside] - begin[inside] > 0).all() and (inside.sum() + 4) == own.stop - own.start
            assert found.tokens["token_type_ids"][own][inside].all()
            spans_of.append([text[a:b] for a, b in zip(begin[inside], end[inside], strict=True)])
        whole = spans_of[0] + [word for later in spans_of[1:] for word in later[stride:]]
        assert whole == text.split()
        assert all(a[len(a) - stride :] == b[:stride] for a, b in itertools.pairwise(spans_of))


def test_a_question_that_is_too_long_is_lost_or_cut(tokenizer):
    """C9: it is counted in training and cut in prediction; one whose context is short enough stays."""
    long, short = " ".join(WORDS[:20]), "bara"
    given = ([long, short, " ".join(WORDS[:11])], [TEXT, TEXT, "cela"])
    lost = contexts.tokenize_contexts(tokenizer, *given, 16, 3, cut=False)
    assert lost.lost == {"question too long": 1} and set(lost.rows) == {1, 2}
    cut = contexts.tokenize_contexts(tokenizer, *given, 16, 3, cut=True)
    assert not cut.lost and set(cut.rows) == {0, 1, 2} and cut.lengths.max() <= 16


def test_a_stride_without_room_is_named(tokenizer):
    """C26: a stride that windows have no room for is named, with the remedy."""
    with pytest.raises(
        ConfigError, match=r"task.stride: windows of 16 tokens, 3 of them special, cannot overlap by 13"
    ):
        contexts.tokenize_contexts(tokenizer, ["bara"], [TEXT], 16, 13, cut=False)


def test_the_cache_gives_the_same(tokenizer, tmp_path):
    """R11: what comes from the cache is what was made, places, rows and what was lost too."""
    worker = replace(tokenizer, home=tmp_path)
    given = ([" ".join(WORDS), "bara"], [TEXT, TEXT])
    made_now, again = (contexts.tokenize_contexts(worker, *given, 16, 3, cut=False) for _ in range(2))
    assert len(list(tmp_path.iterdir())) == 1 and made_now.lost == again.lost == {"question too long": 1}
    for one, other in ((made_now.tokens, again.tokens), (made_now.beside, again.beside)):
        assert one.keys() == other.keys() and all((one[k] == other[k]).all() for k in one)
    assert (made_now.rows == again.rows).all() and (made_now.offsets == again.offsets).all()


def test_answers_become_the_tokens_that_hold_them(tokenizer):
    """C25: in every window the labels say the answer's text, or the first token where it does not hold all of it."""
    found = examples_of(tokenizer, 40)
    encoded, held = found.encoded, set()
    for window, (first, last) in enumerate(found.documents["answer"]):
        row, begin = encoded.rows[window], encoded.offsets[window]
        answers = found.targets[row]
        assert 0 <= first <= last < encoded.lengths[window]
        if last:
            a, b = encoded.beside["begin"][begin + first], encoded.beside["end"][begin + last]
            assert found.texts[1][row][a:b] == answers[0][1]
            held.add(int(row))
        elif answers:
            own = slice(begin, encoded.offsets[window + 1])
            assert answers[0][0] not in encoded.beside["begin"][own]
    assert held == {row for row, answers in enumerate(found.targets) if answers}


def test_a_token_that_reaches_over_an_answer_counts_in():
    """C5: an answer inside a token has that token; one that a window cuts has the first token of the window."""
    beside = {"begin": np.array([-1, 0, 4, -1, 4, 8]), "end": np.array([-1, 4, 8, -1, 8, 12])}
    encoded = Encoded({}, np.array([0, 3, 6]), {}, rows=np.array([0, 0]), beside=beside)
    assert spans.locate(encoded, np.array([5]), np.array([6])).tolist() == [[2, 2], [1, 1]]
    assert spans.locate(encoded, np.array([3]), np.array([5])).tolist() == [[1, 2], [0, 0]]
    assert spans.locate(encoded, np.array([5]), np.array([9])).tolist() == [[0, 0], [1, 2]]
    assert spans.locate(encoded, np.array([0]), np.array([0])).tolist() == [[0, 0], [0, 0]]


# The loss.


def batch_of(encoded: Encoded, length: int, slots: int, spare: int = 1) -> dict:
    """All windows in one batch, with rows of filler."""
    shape = Shape(len(encoded), length, slots)
    rows = lay_out(encoded, np.arange(len(encoded)), shape)
    assert slots == 1 or max(map(len, rows)) > 2, "no row holds several windows: this would test nothing"
    return collate(encoded, rows, shape._replace(rows=len(rows) + spare))


def spread(kept: np.ndarray, encoded: Encoded, batch: dict) -> np.ndarray:
    """Logits of tokens as they stand in a batch; noise on filler."""
    outputs = np.random.default_rng(9).normal(size=(*batch["segment_ids"].shape, 2)).astype(np.float32)
    rows, places = np.nonzero(batch["segment_ids"])
    document = batch["index"][rows, batch["segment_ids"][rows, places] - 1]
    outputs[rows, places] = kept[encoded.offsets[document] + batch["position_ids"][rows, places]]
    return outputs


def test_the_loss_is_the_cross_entropy_of_each_window(tokenizer):
    """R17, C1: packed or padded, the loss is the mean over windows of what each of them has alone."""
    encoded = examples_of(tokenizer).encoded
    kept, expected = random_logits(encoded), []
    for window, answer in enumerate(encoded.documents["answer"]):
        logits = kept[encoded.offsets[window] : encoded.offsets[window + 1]].astype(np.float64)
        expected.append(np.mean([np.log(np.exp(logits[:, k]).sum()) - logits[answer[k], k] for k in range(2)]))
    np.testing.assert_allclose(spans.losses(kept, encoded, encoded.documents["answer"]), expected, rtol=1e-6)
    for length, slots in ((16, 1), (64, slots_for(64))):
        batch = batch_of(encoded, length, slots)
        found = loss(spread(kept, encoded, batch), batch)
        assert float(found.weight) == len(encoded)
        assert float(found.total) == pytest.approx(np.sum(expected), rel=1e-5)


@pytest.mark.parametrize("of", [loss, lambda x, b: divergence(x, 2 * jax.lax.stop_gradient(x), b)])
def test_filler_has_no_part_in_the_loss(tokenizer, of):
    """C16, C34: filler in rows and empty rows have no gradient, all else has a finite one, noise on filler or not."""
    encoded = examples_of(tokenizer).encoded
    batch = batch_of(encoded, 64, slots_for(64), spare=2)
    outputs = spread(random_logits(encoded), encoded, batch)
    filler = batch["segment_ids"] == 0
    other = np.where(filler[..., None], np.float32(1e4), outputs)
    values, gradients = zip(
        *(jax.value_and_grad(lambda x: of(x, batch).value)(x) for x in (outputs, other)), strict=True
    )
    assert values[0] == values[1] and np.isfinite(values[0])
    for gradient in gradients:
        assert np.isfinite(gradient).all() and not gradient[filler].any() and gradient[~filler].any(axis=-1).all()
    np.testing.assert_array_equal(*gradients)


def test_windows_cannot_see_each_other(tokenizer):
    """C3, R17: perturbing one window's tokens leaves the loss and gradients of the others in its row unchanged."""
    encoded = examples_of(tokenizer).encoded
    model = build_model({"model_type": "bert", **TINY_BERT}, Head("question_answering", 2), "tiny")
    params = model.template.initial(jax.random.key(0), model.template.keys)
    batch = batch_of(encoded, 48, slots_for(48))

    @jax.jit
    def of_others(params, batch, segments):
        """The loss of all windows but the first of each row, where tokens see those of their segment."""
        others = {**batch, "weight": batch["weight"] * (jnp.arange(batch["weight"].shape[1]) > 0)}
        seen = {**batch, "segment_ids": segments}
        return jax.value_and_grad(lambda p: loss(model.template.bind(p)(seen), others).value)(params)

    own, one_for_all = batch["segment_ids"], np.minimum(batch["segment_ids"], 1)
    changed = {**batch, "input_ids": np.where(own == 1, (batch["input_ids"] + 7) % 40 + 5, batch["input_ids"])}
    one, other = of_others(params, batch, own), of_others(params, changed, own)
    assert one[0] == other[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), one[1], other[1])
    leaking = [float(of_others(params, given, one_for_all)[0]) for given in (batch, changed)]
    assert np.isfinite(leaking).all() and leaking[0] != leaking[1], "nothing would be seen to leak"


def test_divergence_of_equal_passes_is_nothing(tokenizer):
    """C1: two equal passes are not apart, others are as their distributions say."""
    encoded = examples_of(tokenizer).encoded
    one, other = random_logits(encoded), random_logits(encoded, 1)
    batch = batch_of(encoded, 64, slots_for(64))
    a, b = spread(one, encoded, batch), spread(other, encoded, batch)
    assert float(divergence(a, a, batch).value) == 0
    expected = []
    for begin, end in zip(encoded.offsets[:-1], encoded.offsets[1:], strict=True):
        p, q = (x[begin:end].astype(np.float64) for x in (one, other))
        p, q = (x - np.log(np.exp(x).sum(axis=0)) for x in (p, q))
        expected.append(0.5 * ((np.exp(p) - np.exp(q)) * (p - q)).sum(axis=0).mean())
    assert float(divergence(a, b, batch).value) == pytest.approx(np.mean(expected), rel=1e-4)


# Spans and figures beside naive twins.


def naive_spans(kept: np.ndarray, found: Examples, row: int, count: int, longest: int) -> tuple[list, float]:
    """(best spans, null score) of a row, by trying all."""
    encoded, best, nulls = found.encoded, {}, []
    for window in np.flatnonzero(encoded.rows == row):
        tokens = range(encoded.offsets[window], encoded.offsets[window + 1])
        nulls.append(kept[tokens[0], 0] + kept[tokens[0], 1])
        for i in tokens:
            for j in tokens:
                if i <= j < i + longest and encoded.beside["begin"][i] >= 0 and encoded.beside["begin"][j] >= 0:
                    span = int(encoded.beside["begin"][i]), int(encoded.beside["end"][j])
                    best[span] = max(best.get(span, -np.inf), kept[i, 0] + kept[j, 1])
    ranked = sorted(best.items(), key=lambda item: -item[1])[:count]
    return ranked, min(nulls)


@pytest.mark.parametrize(("count", "longest"), [(1, 4), (5, 1), (7, 3), (200, 50)])
def test_the_best_spans_are_those_of_trying_all(tokenizer, count, longest):
    """S5: the n best of all windows of a row, within the context, not backwards, no longer than asked, each once."""
    found = examples_of(tokenizer, 15)
    kept = random_logits(found.encoded)
    best = spans.best(kept, found.encoded, count, longest)
    for number, row in enumerate(best.rows):
        which = slice(best.offsets[number], best.offsets[number + 1])
        ranked, null = naive_spans(kept, found, row, count, longest)
        assert list(zip(best.begin[which], best.end[which], strict=True)) == [span for span, _ in ranked]
        np.testing.assert_allclose(best.score[which], [score for _, score in ranked], rtol=1e-6)
        assert best.null[number] == null


def official(predictions: dict[str, str], dataset: dict[str, list[str]]) -> dict[str, float]:
    """Exact match and F1 as `evaluate-v2.0.py` defines them, written out plainly."""

    def normalised(text):
        text = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    def f1(gold, said):
        gold_words, words = normalised(gold).split(), normalised(said).split()
        same = sum((collections.Counter(gold_words) & collections.Counter(words)).values())
        if not gold_words or not words:
            return float(gold_words == words)
        if same == 0:
            return 0.0
        precision, recall = same / len(words), same / len(gold_words)
        return 2 * precision * recall / (precision + recall)

    exact, overlap = {}, {}
    for name, golds in dataset.items():
        golds = [gold for gold in golds if normalised(gold)] or [""]
        exact[name] = max(float(normalised(gold) == normalised(predictions[name])) for gold in golds)
        overlap[name] = max(f1(gold, predictions[name]) for gold in golds)
    has = [name for name, golds in dataset.items() if golds]
    no = [name for name, golds in dataset.items() if not golds]

    def mean(values, names):
        return sum(values[name] for name in names) / len(names) if names else 0.0

    return {
        "exact_match": mean(exact, dataset),
        "f1": mean(overlap, dataset),
        "exact_match_answered": mean(exact, has),
        "f1_answered": mean(overlap, has),
        "exact_match_unanswered": mean(exact, no),
    }


PHRASES = [
    "The Cat",
    "a  cat!",
    "cat",
    "an otter's den",
    "otters den",
    "",
    "the",
    "Cat, the otter",
    "U.S.",
    "us",
    "42 %",
]


def test_figures_are_the_official_ones():
    """S5: normalisation, the nearest of several answers, and empty answers, as the official script has them."""
    draw = np.random.default_rng(0)
    said = {str(n): str(draw.choice(PHRASES)) for n in range(400)}
    golds = {n: [str(p) for p in draw.choice(PHRASES, size=draw.integers(0, 4))] for n in said}
    values = squad.scores(list(said.values()), list(golds.values()))
    found = squad.figures(values, np.asarray([bool(gold) for gold in golds.values()]), apart=True)
    assert found == pytest.approx(official(said, golds)) and len(set(found.values())) == 5


def test_the_best_threshold_is_that_of_trying_all():
    """S5: no threshold gives more than the one that is named, which gives what is said of it."""
    draw = np.random.default_rng(0)
    for _ in range(20):
        values, answered = draw.integers(0, 3, 12) / 2, draw.random(12) < 0.6
        apart = draw.integers(-4, 4, 12).astype(float)

        def score(threshold, values=values, answered=answered, apart=apart):
            return np.where(apart > threshold, ~answered, values * answered).mean()

        threshold, value = squad.best_threshold(values, answered, apart)
        assert value == pytest.approx(score(threshold))
        assert value == pytest.approx(max(score(t) for t in np.arange(-6, 6, 0.5)))


@pytest.mark.parametrize("threshold", [-4.0, -2.0, 0.0])
def test_metrics_and_records_agree_with_the_official_evaluation(tokenizer, threshold):
    """S5, C16: records make the official predictions, and the metrics of a split are the official ones of these."""
    section = SECTION.model_copy(update={"null_threshold": threshold})
    task, found = build_task(section, {}), examples_of(tokenizer, 40)
    kept = random_logits(found.encoded)
    records = task.decode(kept, found)
    predictions = {}
    for row, record in enumerate(records):
        ranked, null = naive_spans(kept, found, row, section.n_best, section.max_answer_tokens)
        (begin, end), score = ranked[0]
        predictions[str(row)] = "" if null - score > threshold else found.texts[1][row][begin:end]
        assert record["answer"] == predictions[str(row)] == found.texts[1][row][record["start"] : record["end"]]
        scores = np.asarray([*(score for _, score in ranked), null], np.float64)
        likely = np.sort(np.exp(scores) / np.exp(scores).sum())[::-1]
        np.testing.assert_allclose([one["score"] for one in record["n_best"]], likely, atol=2e-6)
        assert {k: record[k] for k in ("answer", "start", "end", "score")} in record["n_best"]
    golds = {str(row): [text for _, text in answers] for row, answers in enumerate(found.targets)}
    assert task.row_metrics(kept, found) == pytest.approx(official(predictions, golds))
    assert 0 < sum(not text for text in predictions.values()) < len(predictions)
    assert json.loads(json.dumps(records)) == records
    review = task.review(kept, found)
    assert [text if text != "(no answer)" else "" for text in review.predicted] == list(predictions.values())
    tables = task.row_tables(kept, found)
    assert sum(line[1] for line in tables["by question"][1:]) == len(records)
    assert tables["no answer"][1][2] == pytest.approx(task.row_metrics(kept, found)["exact_match"], abs=1e-4)


def test_metric_names_are_those_of_the_metrics(tokenizer):
    """C18: the names that a configuration may ask for are those that evaluation gives, with rows without answer too."""
    for section in (SECTION, SECTION.model_copy(update={"no_answer": False})):
        task, found = build_task(section, {}), examples_of(tokenizer)
        kept, batch = random_logits(found.encoded), batch_of(found.encoded, 16, 1)
        counts = task.count(jnp.asarray(spread(kept, found.encoded, batch)), batch)
        values = {**task.metrics(counts), **task.row_metrics(kept, found)}
        assert tuple(values) == task.metric_names and task.headline in values
        assert all(type(value) is float and np.isfinite(value) for value in values.values())


def test_the_audit_counts_windows_and_shows_answers(tokenizer):
    """C4: the pieces that are supervised are the answers; where no window holds one, nothing is trained."""
    task, found = build_task(SECTION, {}), examples_of(tokenizer, 20)
    audit = task.audit(found, tokenizer)
    assert audit is not None and not audit.problems and audit.facts["answers that no window holds"] == "0"
    said = [text for pieces in audit.rows for text, learned in pieces if learned]
    assert said and set(said) <= {answers[0][1] for answers in found.targets if answers}
    silent = Examples(task.encode(found.texts, [()] * 20, tokenizer, 16), found.texts, [()] * 20)
    audit = task.audit(silent, tokenizer)
    assert audit is not None and "no window holds an answer" in audit.problems[0]


def test_restored_from_an_export_and_from_others():
    """C17: the same section comes back from our `config.json`; a model of others by its class."""
    section = SECTION.model_copy(update={"context": "passage", "null_threshold": 0.5})
    again = restore_task({"architectures": ["BertForQuestionAnswering"], **build_task(section, {}).to_hf()}, "here")
    assert again.kind == "question_answering" and again.texts == ("question", "passage")
    assert again.metric_names == build_task(section, {}).metric_names
    assert restore_task({"architectures": ["RobertaForQuestionAnswering"]}, "here").head == Head(
        "question_answering", 2
    )


# Whole runs.


def test_a_whole_run(configure, tmp_path):
    """R57, C16, C17: a run learns, evaluates alike again, exports, and its predictions carry the rows' ids."""
    files = [f"data.source.{split}={write_questions(tmp_path / f'{split}.jsonl', n, n)}" for split, n in SIZES.items()]
    model = write_model(tmp_path / "model", SMALL)
    task = ("task.kind=question_answering", "task.no_answer=true", "task.stride=4", "data.max_length=16")
    settings = ("train.epochs=12", "optim.lr=1e-2", "eval.baselines=true", ONE_SHAPE, f"model.source={model}")
    built = run.prepare(configure(*files, *task, *settings))
    assert len(built.data["train"]) > len(built.rows["train"]), "no row has several windows"
    result = jobs.train(built)
    assert result.test is not None and result.test.metrics["f1"] > 1.5 * max(result.baselines.values())
    assert result.test.metrics["f1"] > 0.6
    again, _ = jobs.evaluate(run.open_run(result.directory), "test")
    assert again.metrics == pytest.approx(result.test.metrics, rel=1e-5)
    rows = built.rows["test"].rows
    predictor = load_predictor(str(result.directory / "model"))
    records = list(predictor(rows, batch_size=1))
    assert [record["id"] for record in records] == rows.column("id")
    review = built.task.review(again.kept, built.examples("test"))
    said = [record["answer"] or "(no answer)" for record in records]
    assert sum(a == b for a, b in zip(said, review.predicted, strict=True)) >= len(said) - 1, "but for rounding"
    with pytest.raises(DataError, match="no column 'context'; the rows have: question"):
        list(predictor(["bara"]))
