"""Token classification: words and tags in, spans as seqeval counts them, words that are never lost."""

import json
import random
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SPECIAL, WORDS, write_tokenizer
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics import f1_score, precision_score, recall_score
from seqeval.scheme import IOB2, IOBES

from sft_jax.config.tasks import TokenClassification
from sft_jax.data.batch import Encoded, Shape, collate, lay_out
from sft_jax.data.rows import Rows
from sft_jax.data.text import TextTokenizer, load_tokenizer
from sft_jax.data.words import tokenize_words
from sft_jax.errors import ConfigError, DataError
from sft_jax.tasks.tag_schemes import scheme_of, span_scores, spans, strict_spans, summary
from sft_jax.tasks.task import Examples, build_task, restore_task
from sft_jax.tasks.token_classification import averaged

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
ALL = [f"{prefix}-{kind}" for prefix in "BIES" for kind in ("X", "Y", "Z-Z")] + ["O"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """The tokenizer of the tests, which also cuts unknown words into letters."""
    home = tmp_path_factory.mktemp("pieces")
    write_tokenizer(home)
    written = json.loads((home / "tokenizer.json").read_text())
    vocabulary = [*SPECIAL, *WORDS, *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"), *"xyz"]
    written["model"]["vocab"] = {word: number for number, word in enumerate(vocabulary)}
    (home / "tokenizer.json").write_text(json.dumps(written))
    return load_tokenizer(home)


def table(words: list, tags: list, names: list[str] | None = None) -> dict[str, Rows]:
    """Training rows of words and tags."""
    if names is None:
        return {"train": Rows(Dataset.from_dict({"tokens": words, "tags": tags}), "data.source.train")}
    features = Features({"tokens": Sequence(Value("string")), "tags": Sequence(ClassLabel(names=names))})
    return {"train": Rows(Dataset.from_dict({"tokens": words, "tags": tags}, features), "data.source.train")}


def task_of(**options):
    """The task with these options over TAGS."""
    section = TokenClassification(kind="token_classification", **{"labels": TAGS, **options})
    return build_task(section, {})


# -- spans


@given(st.lists(st.tuples(st.sampled_from(ALL), st.sampled_from(ALL)), min_size=1, max_size=40), st.integers(1, 5))
def test_span_scores_equal_those_of_seqeval(pairs, rows):
    """S4: precision, recall, F1 and its mean over types equal seqeval's on any tags, illegal transitions included."""
    cuts = sorted(random.Random(len(pairs)).sample(range(len(pairs) + 1), min(rows, len(pairs))))
    sides = [[tag for tag, _ in pairs], [tag for _, tag in pairs]]
    truth, said = ([side[a:b] for a, b in zip([0, *cuts], [*cuts, len(pairs)], strict=True)] for side in sides)
    found = summary(span_scores(truth, said))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is not defined, which is 0 there too
        expected = [precision_score(truth, said), recall_score(truth, said), f1_score(truth, said)]
        expected.append(f1_score(truth, said, average="macro"))
    assert list(found.values()) == pytest.approx(np.nan_to_num(expected))  # the mean over no types: NaN there, 0 here


@pytest.mark.parametrize(("scheme", "theirs", "tags"), [("BIO", IOB2, "BI"), ("BIOES", IOBES, "BIES")])
def test_strict_spans_equal_those_of_seqeval(scheme, theirs, tags):
    """S4: spans that are not spelled as the scheme has them count for nothing, as in seqeval's strict mode."""
    draw = random.Random(3)
    labels = [*(f"{prefix}-{kind}" for prefix in tags for kind in "XY"), "O"]
    truth, said = ([[draw.choice(labels) for _ in range(12)] for _ in range(60)] for _ in range(2))
    found = summary(span_scores(truth, said, lambda row: strict_spans(row, scheme)))["span_f1"]
    assert 0 < found == pytest.approx(f1_score(truth, said, mode="strict", scheme=theirs))
    assert found != pytest.approx(summary(span_scores(truth, said))["span_f1"]), "the control: leniently it is another"


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (TAGS, "BIO"),
        (["O", "I-A", "I-B"], "IO"),
        (["O", "B-A", "E-A", "S-A"], "BIOES"),
        (["NOUN", "VERB"], "none"),
        (["O", "NOUN"], "none"),
        (["O"], "none"),
    ],
)
def test_the_scheme_is_told_by_the_names(labels, expected):
    """S4: the smallest scheme that has all prefixes; parts of speech are no spans."""
    assert scheme_of(labels) == expected
    assert spans(["B-A", "I-A", "O", "I-B"]) == [("A", 0, 2), ("B", 3, 4)]


def test_a_scheme_that_does_not_fit_is_refused():
    """C25: spans are not read out of tags that have none."""
    with pytest.raises(ConfigError, match=r"task\.scheme: the tags are no spans, such as 'b'; set it to auto or none"):
        task_of(labels=["a", "b"], scheme="BIO")


# -- rows


def test_rows_that_do_not_fit_are_named():
    """C25 C21: rows without words, with more tags or fewer, or with a tag that is none, are bad, each by its place."""
    words = [["bara", "bare"], ["bara"], [], ["bara"], "bara bare"]
    tags = [["O", "B-PER"], ["O", "O"], ["O"], ["B-PRE"], "O I-LOC"]
    task, rows = task_of(), Rows(Dataset.from_dict({"tokens": [w if isinstance(w, list) else w.split() for w in words],
        "tags": [t if isinstance(t, list) else t.split() for t in tags]}), "data.source.train")  # fmt: skip
    (texts,), without = task.read(rows)
    found = task.targets(rows)
    assert texts[4] == ("bara", "bare") and found.values[0] == (0, 1) and found.values[4] == (0, 4)
    assert without[2].text == "tokens is [], expected a list of words"
    assert found.bad[1].text == "tags has 2 tags, expected 1, one for each word"
    assert found.bad[3].text.startswith("tags has 'B-PRE'") and "expected one of the 5 labels" in found.bad[3].text


def test_tags_take_their_names_from_the_source():
    """S4: numbers with names keep these and their order; names without are sorted, `O` first."""
    section = TokenClassification(kind="token_classification")
    words = [["a", "b"], ["c"]]
    assert build_task(section, table(words, [[1, 0], [2]], ["X", "O", "Y"])).labels == ("X", "O", "Y")
    assert build_task(section, table(words, [["B-A", "O"], ["I-A"]])).labels == ("O", "B-A", "I-A")
    with pytest.raises(DataError, match=r"column 'tags' holds 1 tags; expected lists with a tag for each word"):
        build_task(section, table(words, [["O", "O"], ["O"]]))


# -- documents


def encoded(tokenizer: TextTokenizer, rows: list, tags: list, length: int = 16, **options) -> Encoded:
    """Rows of words as documents."""
    return task_of(**options).encode([[tuple(row) for row in rows]], [tuple(t) for t in tags], tokenizer, length)


def test_the_first_token_of_a_word_answers(tokenizer):
    """S4: a word of three tokens is trained on and read at its first; special tokens are not."""
    found = encoded(tokenizer, [["bara", "xyz", "bare"]], [[0, 1, 2]])
    assert found.beside["word"].tolist() == [-1, 0, 1, 1, 1, 2, -1]
    assert found.tokens["token_weight"].tolist() == [0, 1, 1, 0, 0, 1, 0]
    assert found.tokens["label"][[1, 2, 5]].tolist() == [0, 1, 2]


def test_all_tokens_of_a_word_can_be_trained_on(tokenizer):
    """S4: with align=all the others of a B- are I-, and the first alone is read."""
    found = encoded(tokenizer, [["bara", "xyz", "bare"]], [[0, 1, 4]], align="all")
    assert found.tokens["token_weight"].tolist() == [0, 1, 1, 1, 1, 1, 0]
    assert found.tokens["label"][1:6].tolist() == [0, 1, 2, 2, 4]
    assert found.tokens["answers"].tolist() == [0, 1, 1, 0, 0, 1, 0]


def test_the_mean_of_all_tokens_can_be_read(tokenizer):
    """S4: with align=average the outputs of a word's tokens are averaged where the word is read."""
    found = encoded(tokenizer, [["bara", "xyz", "bare"]], [[0, 1, 4]], align="average")
    batch = collate(found, [[0]], Shape(2, 8, 1))
    logits = np.random.default_rng(0).normal(size=(2, 8, 5)).astype(np.float32)
    mean = np.asarray(averaged(jnp.asarray(logits), jnp.asarray(batch["back"])))
    np.testing.assert_allclose(mean[0, 2], logits[0, 2:5].mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(mean[0, [1, 5]], logits[0, [1, 5]], rtol=1e-6)


@pytest.mark.parametrize("length", [7, 9, 12])
def test_long_rows_lose_no_word(tokenizer, length):
    """C9: windows overlap, and each word is answered once, whole, with context on both sides where there is any."""
    draw = np.random.default_rng(length)
    row = [str(word) for word in draw.choice([*WORDS, "xyz", "zz"], size=60)]
    found = tokenize_words(tokenizer, [row, ["bara"]], length, 3)
    answered = found.word[found.first & (np.repeat(found.rows, np.diff(found.offsets)) == 0)]
    assert sorted(answered.tolist()) == list(range(60)) and found.rows[-1] == 1 and len(found.rows) > 8
    inner = [
        found.offsets[window] + 1 < place < found.offsets[window + 1] - 2
        for window in range(1, len(found.rows) - 2)
        for place in np.flatnonzero(found.first[found.offsets[window] : found.offsets[window + 1]])
        + found.offsets[window]
    ]
    assert np.mean(inner) > 0.9, "words at the edge are left to the window beside"


def test_windows_come_from_a_cache(tokenizer, tmp_path, monkeypatch):
    """C22: the same rows are found again; another length, stride or word makes them anew."""
    from dataclasses import replace

    from sft_jax.data import words

    made: list[int] = []
    real = words._windows
    monkeypatch.setattr(words, "_windows", lambda *given: made.append(1) or real(*given))
    kept = replace(tokenizer, home=tmp_path / "tokens")
    rows = [["bara", "xyz"], ["bare"]]
    one, again = (tokenize_words(kept, rows, 8, 2) for _ in range(2))
    assert len(made) == 1 and all((one.fields[n] == again.fields[n]).all() for n in one.fields)
    assert (one.word == again.word).all() and (one.first == again.first).all() and (one.rows == again.rows).all()
    tokenize_words(kept, rows, 9, 2)
    tokenize_words(kept, rows, 8, 1)
    tokenize_words(kept, [["bara"], ["xyz", "bare"]], 8, 2)
    tokenize_words(kept, [["bara", "\n", "xyz", "bare"]], 8, 2)
    assert len(made) == 5


def test_words_by_themselves_are_those_of_transformers(tmp_path):
    """C7: a byte-level tokenizer puts a blank before each word, as `is_split_into_words` with `add_prefix_space`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    fast.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    fast.save(str(tmp_path / "tokenizer.json"))
    rows = [["bara", "cela"], ["x-y", "dori", "12"]]
    with_blank = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    with_blank.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    expected = PreTrainedTokenizerFast(tokenizer_object=with_blank)(rows, is_split_into_words=True)["input_ids"]
    found = tokenize_words(load_tokenizer(tmp_path), rows, 64, 4)
    assert [ids.tolist() for ids in np.split(found.fields["input_ids"], found.offsets[1:-1])] == expected


# -- answers


def answers(tokenizer: TextTokenizer, packed: bool):
    """(task, examples, kept) of 40 rows, some of them longer than a window, whose logits say what the words are."""
    draw = np.random.default_rng(1)
    rows = [tuple(draw.choice([*WORDS, "xyz"], size=int(n)).tolist()) for n in draw.integers(1, 30, 40)]
    tags = [tuple(int(t) for t in draw.integers(0, 5, len(row))) for row in rows]
    task = task_of(stride=3)
    found = task.encode([rows], tags, tokenizer, 16)
    shape = Shape(80, 32, 4 if packed else 1)
    batch = collate(found, lay_out(found, np.arange(len(found)), shape), shape)
    noise = draw.normal(size=(found.offsets[-1], 5)).astype(np.float32)
    wanted = noise + 2.0 * np.eye(5, dtype=np.float32)[found.tokens["label"]]
    r, t = np.nonzero(batch["segment_ids"])
    document = batch["index"][r, batch["segment_ids"][r, t] - 1]
    logits = np.zeros((80, 32, 5), np.float32)
    logits[r, t] = wanted[found.offsets[document] + batch["position_ids"][r, t]]
    from sft_jax.data.batch import collect, room_for

    outputs = np.asarray(task.keep(jnp.asarray(logits), batch))
    kept = room_for(outputs, found, task.grain)
    collect(kept, batch, outputs, found, task.grain)
    return task, Examples(found, (rows,), tags), kept, task.count(jnp.asarray(logits), batch)


def test_packed_rows_are_scored_as_rows_by_themselves(tokenizer):
    """R17 C16: counts, spans and records do not depend on the layout, and filler is not counted."""
    (task, examples, kept, counts), (_, _, others, padded) = (answers(tokenizer, packed) for packed in (True, False))
    np.testing.assert_array_equal(kept, others)
    np.testing.assert_array_equal(counts.confusion, padded.confusion)
    assert int(np.asarray(counts.confusion).sum()) == sum(map(len, examples.texts[0])), "each word is counted once"
    metrics = {**task.metrics(counts), **task.row_metrics(kept, examples)}
    assert tuple(metrics) == task.metric_names and 0.3 < metrics["span_f1"] < 1
    records = task.decode(kept, examples)
    assert [record["words"] for record in records] == [list(row) for row in examples.texts[0]]
    said = [record["tags"] for record in records]
    truth = [[TAGS[tag] for tag in tags] for tags in examples.targets]
    assert metrics["span_f1"] == pytest.approx(f1_score(truth, said))
    assert json.loads(json.dumps(records)) == records


def test_a_review_names_the_spans(tokenizer):
    """S11: rows that are right are right, and others show what is there and what was said."""
    task, examples, kept, _ = answers(tokenizer, True)
    found = task.review(kept, examples)
    records = task.decode(kept, examples)
    truth = [[TAGS[tag] for tag in tags] for tags in examples.targets]
    right = [tags == record["tags"] for tags, record in zip(truth, records, strict=True)]
    assert found.right.tolist() == right and 0 < sum(right) < len(right)
    assert any("PER: " in shown for shown in found.truth) and np.isfinite(found.loss).all()
    assert task.row_tables(kept, examples)["spans"][0] == ["type", "precision", "recall", "F1", "spans", "said"]


def test_an_empty_row_has_no_part(tokenizer):
    """C34 C16: rows of filler add nothing to the loss, and their outputs get no gradient."""
    import jax

    task = task_of()
    found = encoded(tokenizer, [["bara", "bare"]], [[1, 2]])
    batch = {name: jnp.asarray(values) for name, values in collate(found, [[0]], Shape(3, 8, 2)).items()}
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 5)), jnp.float32)
    gradient = np.asarray(jax.grad(lambda x: task.loss(x, batch).value)(logits))
    assert np.isfinite(gradient).all() and gradient[0].any() and not gradient[1:].any()
    assert float(task.loss(logits, batch).weight) == 2


def test_the_commonest_tag_of_each_word_is_the_baseline():
    """S11: each word gets its commonest tag of training, unknown words the commonest of all."""
    task = task_of(labels=["N", "V"])
    train = Examples(Encoded({}, np.arange(4), {}), ([("a", "b"), ("a",), ("b",)],), [(0, 1), (0,), (1,)])
    test = Examples(Encoded({}, np.arange(3), {}), ([("a", "b"), ("c",)],), [(0, 0), (0,)])
    assert task.baselines(train, test) == {"commonest tag of each word": pytest.approx(2 / 3)}


def test_what_an_export_says_brings_the_task_back():
    """C17: labels, columns and alignment come back from `config.json`; a model of others by its class."""
    task = task_of(align="all", words="w", stride=5)
    written = {"architectures": ["BertForTokenClassification"], **task.to_hf()}
    again = restore_task(written, "here")
    assert (again.labels, again.texts, again.head) == (task.labels, ("w",), task.head)
    others = {"architectures": ["XForTokenClassification"], "id2label": {"0": "O", "1": "B-X"}}
    assert restore_task(others, "here").kind == "token_classification"


# -- what other people's files hold


@pytest.mark.parametrize(
    ("words", "tags"),
    [
        ("['John', 'lives', \"it's\"]", "['B-PER', 'O', 'O']"),
        ('["John", "lives", "it\'s"]', '["B-PER", "O", "O"]'),
        ("['John' 'lives' \"it's\"]", "['B-PER' 'O'\n 'O']"),
        ("array(['John', 'lives', \"it's\"], dtype=object)", "array([1, 0, 0])"),
        ("('John', 'lives', \"it's\")", "(1, 0, 0)"),
        ("John lives it's", "1 0 0"),
    ],
)
def test_lists_in_cells_are_read(words, tags):
    """K: the repr of a list, as pandas and numpy write it into a CSV, is the list, and is never cut at blanks."""
    rows = Rows(Dataset.from_dict({"tokens": [words], "tags": [tags]}), "data.source.train")
    task = task_of(labels=["O", "B-PER"] if "B-PER" in tags else ["0", "1"])
    (found,), bad = task.read(rows)
    assert found == [("John", "lives", "it's")] and not bad
    targets = task.targets(rows)
    assert targets.values == [(1, 0, 0)], targets.bad


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("[John, lives]", "is no list or object that can be read"),
        ("['John' 'lives', 'here']", "commas between some of its values and blanks between others"),
        ("['John' 'lives' ... 'here']", "was cut with '...'"),
        ("['John', 'lives'", None),
    ],
)
def test_lists_in_cells_that_cannot_be_read_are_bad_rows(cell, said):
    """K: what looks like a list and is none that can be read is named, with why; a text that does not is a text."""
    rows = Rows(Dataset.from_dict({"tokens": [cell], "tags": [cell]}), "data.source.train")
    (found,), bad = task_of().read(rows)
    if said is None:
        assert found == [("['John',", "'lives'")] and not bad
    else:
        assert said in bad[0].text and said in task_of().targets(rows).bad[0].text and found == [()]


def test_missing_and_nested_columns_of_tags_are_said_or_read():
    """F6: a column of tags that is not there is a message with those that are, and one inside of objects is read."""
    rows = {"train": Rows(Dataset.from_dict({"tokens": [["a"]], "ner_tags": [["O"]]}), "data.source.train")}
    section = TokenClassification(kind="token_classification")
    with pytest.raises(DataError) as caught:
        build_task(section, rows)
    assert str(caught.value) == (
        "data.source.train: no column 'tags'; the rows have: tokens, ner_tags; did you mean 'ner_tags'?"
    )
    inner = Features({"tokens": Sequence(Value("string")), "meta": {"tags": Sequence(ClassLabel(names=["O", "B-X"]))}})
    named = Dataset.from_dict({"tokens": [["a", "b"]], "meta": [{"tags": [1, 0]}]}, inner)
    task = build_task(section.model_copy(update={"tags": "meta.tags"}), {"train": Rows(named, "data.source.train")})
    assert task.labels == ("O", "B-X") and task.targets(Rows(named, "data.source.train")).values == [(1, 0)]
    lines = {"train": Rows(Dataset.from_dict({"text": ["a O"]}), "data.source.train")}
    with pytest.raises(
        DataError, match=r"is lines of text, a row each; files of words with their tags .* end in .conll"
    ):
        build_task(section, lines)


def spans_of(text: str, spans: Any) -> tuple:
    """(words, tags by name, what is wrong) of a text with spans."""
    rows = Rows(Dataset.from_dict({"text": [text], "e": [json.dumps(spans)]}), "t", written=frozenset({"e"}))
    section = TokenClassification(kind="token_classification", spans="e", labels=TAGS)
    task = build_task(section, {})
    (words,), bad = task.read(rows)
    found = task.targets(rows)
    tags = None if found.values[0] is None else [TAGS[tag] for tag in found.values[0]]
    return list(words[0]), tags, [one.text for one in {**bad, **found.bad}.values()]


@pytest.mark.parametrize(
    "spans",
    [
        [[0, 8, "PER"], [18, 24, "LOC"]],
        [{"start": 18, "end": 24, "label": "LOC"}, {"start": 0, "end": 8, "label": "PER"}],
        [{"start_offset": 0, "end_offset": 8, "label": "PER"}, {"start_offset": 18, "end_offset": 24, "label": "LOC"}],
        {"entities": [[0, 8, "PER"], [18, 24, "LOC"]]},
    ],
)
def test_spans_of_characters_are_tags(spans):
    """Offsets as spaCy, Prodigy and doccano write them make the tags that spaCy's own conversion makes of them."""
    words, tags, bad = spans_of("Jo Smith lives in Berlin.", spans)
    assert words == ["Jo", "Smith", "lives", "in", "Berlin", "."] and not bad
    assert tags == ["B-PER", "I-PER", "O", "O", "B-LOC", "O"]


@pytest.mark.parametrize(
    ("spans", "said"),
    [
        ([[0, 4, "PER"]], "e has 'PER' at [0:4], which is 'Jo S'; it begins or ends within a word, or at a blank"),
        ([[0, 3, "PER"]], "which is 'Jo '; it begins or ends within a word, or at a blank"),
        ([[0, 80, "PER"]], "at [0:80], and the text has 9 characters"),
        ([[0, 8, "PER"], [3, 8, "LOC"]], "where another span is"),
        ([[0, 8]], "e holds [0, 8], expected [begin, end, label]"),
        ([[0, 8, "ORG"]], "e has 'ORG'; "),
        ("nothing", "e is 'nothing', expected a list of"),
        (None, "e is None, expected a list of"),
    ],
)
def test_spans_that_fit_no_words_are_bad_rows(spans, said):
    """A span that is no run of whole words is named, and its row is no row; none is moved or left out in silence."""
    assert said in spans_of("Jo Smith.", spans)[2][0]


def test_a_task_on_spans_comes_back_from_disk():
    """What was trained on spans cuts texts into the same words when it predicts."""
    train = Rows(Dataset.from_dict({"body": ["Jo's ok"], "e": ['[[0, 2, "X"]]']}), "t", written=frozenset({"e"}))
    task = build_task(TokenClassification(kind="token_classification", text="body", spans="e"), {"train": train})
    again = restore_task(task.to_hf(), "here")
    assert again.labels == task.labels == ("O", "B-X", "I-X") and again.texts == ("body",)
    assert again.read(train)[0] == ([("Jo", "'", "s", "ok")],)
    assert spans_of("東京へ行く", [[0, 2, "LOC"]])[:2] == (list("東京へ行く"), ["B-LOC", "I-LOC", "O", "O", "O"])
