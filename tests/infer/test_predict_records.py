"""A record for each record of the input: bad rows in place, what was cut said, what Python hands over, few shapes."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import jax
import numpy as np
import pandas
import pytest
from conftest import WORDS, write_model
from translations import write_t5

from sft_jax.errors import ConfigError, DataError, RunError
from sft_jax.infer.inputs import FIRST, opened, stream_inputs
from sft_jax.infer.lengths import declared, fewer_rows, more_rows, sizes
from sft_jax.infer.predict import Predictor, find_model, load_predictor
from sft_jax.infer.records import Counted
from sft_jax.models.family import NO_LIMIT

CLASSES = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "no", "1": "yes"}}
TEXT = {"kind": "sequence_classification", "text": "text", "text_pair": None, "max_length": 24}
PAIR = {**TEXT, "text_pair": "other"}
COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models: ours for texts and for pairs, and one of others that has 300 positions."""
    home = tmp_path_factory.mktemp("records")
    write_model(home / "ours", {**CLASSES, "sft_jax_task": TEXT}, seed=5, head=2)
    write_model(home / "pairs", {**CLASSES, "sft_jax_task": PAIR}, seed=5, head=2)
    write_model(home / "foreign", {**CLASSES, "max_position_embeddings": 300}, seed=5, head=2)
    return home


@pytest.fixture(scope="module")
def predictor(home: Path) -> Predictor:
    """That for texts."""
    return load_predictor(str(home / "ours"))


def words(count: int, seed: int = 0) -> str:
    """A text of so many words, each of which is a token."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


def of_lines(predictor: Predictor, content: bytes, bad_rows: str = "keep", **how) -> tuple[list[dict], Counted]:
    """(the records of standard input, what became of it)."""
    stdin, counted = opened(content.decode("utf-8", "surrogateescape")), Counted()
    windows = stream_inputs([], predictor.task, stdin)
    windows = [*windows] if bad_rows == "error" else windows
    return [*predictor.stream(windows, 4, bad_rows=bad_rows, counted=counted, **how)], counted


# Bad rows.


def test_a_record_for_each_line(predictor):
    """S (cases 42, 43): blank lines and bytes that are not UTF-8 have their error where their answer would stand."""
    found, counted = of_lines(predictor, b"bara\n\n  \ncela\xff\ndoro\n")
    assert [record.get("line") for record in found] == [None, 2, 3, 4, None]
    assert [record["error"].partition(":")[0] for record in found[1:4]] == ["no text", "no text", "broken UTF-8"]
    assert [found[0], found[4]] == [*predictor(["bara", "doro"])]
    assert (counted.records, counted.bad, counted.first[2].place) == (5, 3, "line 4")
    left, counted = of_lines(predictor, b"bara\n\n  \ncela\xff\ndoro\n", "drop")
    assert left == [found[0], found[4]] and (counted.records, counted.bad) == (5, 3)
    with pytest.raises(DataError) as caught:
        of_lines(predictor, b"bara\n\n  \ncela\xff\ndoro\n", "error")
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()[1:]] == [
        f"  - line {n}" for n in (2, 3, 4)
    ]
    with pytest.raises(ConfigError, match="bad_rows: expected error, keep or drop, got 'skip'"):
        of_lines(predictor, b"bara\n", "skip")


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_rows_of_files_are_in_their_order(ending, predictor, tmp_path):
    """S: of a table with rows that are none, and rows that lack a text, each has its record, named by file and line."""
    lines = {
        "csv": ["id,text", "1,bara", "2,", "3,cela,x", "4,doro"],
        "jsonl": ['{"id": 1, "text": "bara"}', '{"id": 2, "text": ""}', "{", '{"id": 4, "text": "doro"}'],
    }[ending]
    file = tmp_path / f"rows.{ending}"
    file.write_text("\n".join(lines) + "\n")
    found = [*predictor.stream(stream_inputs([str(file)], predictor.task, opened("")), bad_rows="keep")]
    first = 2 if ending == "csv" else 1
    assert [record.get("id") for record in found] == [1, 2, None, 4]
    assert [record.get("line") for record in found] == [None, first + 1, first + 2, None]
    assert [record["label"] for record in (found[0], found[3])] == [r["label"] for r in predictor(["bara", "doro"])]
    twice = [*predictor.stream(stream_inputs([str(file), str(file)], predictor.task, opened("")), bad_rows="keep")]
    assert len(twice) == 8 and all(record["file"].endswith(f"rows.{ending}") for record in twice if "error" in record)


def test_a_column_that_is_missing_is_named_with_the_way_out(home, predictor, tmp_path):
    """A model that reads `text` is told another column; one that it does not read is refused by name."""
    (tmp_path / "rows.csv").write_text("body,number,text\nbara,7,cela\ndoro,8,fena\n")
    renamed = load_predictor(str(home / "ours"), columns={"text": "body", "id": "number"})
    found = [*renamed.stream(stream_inputs([str(tmp_path / "rows.csv")], renamed.task, opened("")))]
    expected = [*predictor(["bara", "doro"])]
    assert found == [{"id": 7, **expected[0]}, {"id": 8, **expected[1]}]
    with pytest.raises(ConfigError, match=r"--columns: the model reads text, label, not txt; did you mean 'text'"):
        load_predictor(str(home / "ours"), columns={"txt": "body"})
    with pytest.raises(ConfigError, match=r"--set text=body: text is a column that the model reads; say --columns"):
        load_predictor(str(home / "ours"), ["text=body"])
    with pytest.raises(DataError, match=r"no column 'text'; the rows have: body; .*say so: --columns text=OTHER"):
        list(predictor([{"body": "bara"}]))


def test_columns_are_carried(predictor):
    """Columns of the input stand in records as they are; one that records have of their own is called by its place."""
    rows = [{"id": 1, "text": "bara", "label": "gold", "more": {"a": [1, None, 2.5]}}, {"text": "", "label": None}]
    (first, second) = predictor(rows, bad_rows="keep", keep=["label", "more"])
    assert (first["id"], first["input.label"], first["more"]) == (1, "gold", {"a": [1, None, 2.5]})
    assert second["input.label"] is None and second["row"] == 2 and second["error"].startswith("no text")
    (whole,) = predictor(rows[:1], keep="all")
    assert {"id", "text", "input.label", "more", "label", "scores"} == set(whole)
    with pytest.raises(ConfigError, match="keep: no column 'labels'; did you mean 'label'"):
        list(predictor(rows[:1], keep=["labels"]))


# Lengths.


def test_what_is_cut_says_so(predictor):
    """S (case 44): the record of a text that is longer than the model reads says so, others not."""
    counted = Counted()
    windows = stream_inputs([], predictor.task, opened("\n".join(words(count) for count in (3, 22, 23, 60))))
    found = [record.get("truncated") for record in predictor.stream(windows, counted=counted)]
    assert found == [None, None, True, True] and counted.truncated == 2


def test_a_model_of_others_reads_as_much_as_it_has_positions(home):
    """S (case 44): 200 tokens give what `transformers` computes of all of them; 400 are cut to its 300 positions."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    reference = transformers.AutoModelForSequenceClassification.from_pretrained(str(home / "foreign")).eval()
    predictor = load_predictor(str(home / "foreign"))
    texts = [words(198), words(398, 1)]
    found = [*predictor(texts, raw=True)]
    assert [record.get("truncated") for record in found] == [None, True]
    for text, record in zip(texts, found, strict=True):
        predictor.tokenizer.fast.enable_truncation(300)
        ids = torch.tensor([predictor.tokenizer.fast.encode(text).ids])
        with torch.no_grad():
            expected = reference(input_ids=ids).logits[0].numpy()
        np.testing.assert_allclose(record["logits"], expected, atol=2e-5)
    cut = next(iter(predictor([words(126)], raw=True)))["logits"]
    assert np.abs(np.asarray(cut) - found[0]["logits"]).max() > 1e-3, "128 tokens of it would be another answer"


def test_the_tokenizer_says_where_a_model_has_no_positions(home, tmp_path):
    """A model without a table of positions reads what its tokenizer says, or all; one with a table all that it has."""
    for said, expected in ((30, 30), (1e30, NO_LIMIT)):
        (home / "foreign" / "tokenizer_config.json").write_text(json.dumps({"model_max_length": said}))
        assert load_predictor(str(home / "foreign")).max_length == 300
        model = write_t5(tmp_path / f"{said}")
        file = model / "tokenizer_config.json"
        before = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps({**before, "model_max_length": said}))
        predictor = load_predictor(str(model), ["max_new_tokens=2"])
        assert predictor.max_length == expected
        assert ("truncated" in predictor(words(40))) == (expected == 30)


def test_lengths_and_rows_are_declared():
    """There are few of them, they hold what comes, and neither is far more than is needed."""
    assert sizes(300) == [16, 32, 64, 128, 256, 304] and sizes(24) == [16, 24] and sizes(1) == [8]
    for length in range(1, 301):
        assert length <= declared(length, 300) <= max(16, 2 * length) and declared(length, 300) in sizes(300)
    assert {fewer_rows(count, 32) for count in range(1, 100)} == {1, 4, 16, 32}
    assert all(count <= more_rows(count, 32) <= 4 * count for count in range(1, 33))
    assert fewer_rows(3, 1) == more_rows(1, 1) == 1


def compilations(call) -> int:
    """How often jax compiles while something is called."""
    found: list[float] = []

    def listen(event: str, seconds: float, **more: object) -> None:
        if event == COMPILED:
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        call()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return len(found)


def test_no_length_compiles_twice(home):
    """C29: forty texts of forty lengths, one after the other, compile once for each declared length, and none after a
    warm-up; before, each length that had not been met compiled."""
    predictor = load_predictor(str(home / "ours"))
    predictor = replace(predictor, max_length=40)
    texts = [words(count) for count in range(1, 41)]
    assert compilations(lambda: [predictor(text) for text in texts]) == len(sizes(40)) == 3
    assert compilations(lambda: [predictor(text) for text in texts]) == 0
    assert compilations(lambda: [*predictor(texts)]) <= 2, "of many at a time there are more rows"
    warm = replace(load_predictor(str(home / "pairs")), max_length=40)
    assert compilations(lambda: warm.warm_up()) == 3
    assert compilations(lambda: [warm({"text": text, "other": "bara"}) for text in texts]) == 0


def test_first_records_come_before_the_last_rows_are_read(predictor):
    """Rows are read as they are answered: one window ahead, so that memory is flat and the first answers are early."""
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield "bara"

    found = predictor(endless())
    assert next(found)["label"] and taken <= FIRST
    for _ in range(100):
        next(found)
    assert taken <= (1 + 2 + 4) * FIRST


# What Python hands over.


def test_what_python_hands_over(predictor, home):
    """Newcomer 6: one row gives its record, several give one each, whatever they come in."""
    texts = ["bara", "cela doro", "fena"]
    expected = [*predictor(texts)]
    assert predictor("bara") == predictor({"text": "bara"}) == expected[0]
    frame = pandas.DataFrame({"more": [1, 2, 3], "text": texts})
    for several in (
        tuple(texts),
        iter(texts),
        (text for text in texts),
        np.array(texts),
        np.array(texts, object),
        frame,
        frame["text"],
        datasets.Dataset.from_pandas(frame),
        frame.to_dict("records"),
        [{"text": text} for text in texts],
    ):
        assert [*predictor(several)] == expected
    pairs = load_predictor(str(home / "pairs"))
    both = [*pairs([{"text": "bara", "other": "cela"}, {"text": "doro", "other": "fena"}])]
    assert [*pairs([("bara", "cela"), ("doro", "fena")])] == both
    assert pairs({"text": "bara", "other": "cela"}) == both[0]
    named = pandas.DataFrame({"id": ["a", "b", "c"], "text": texts}, index=[7, 8, 9])
    assert [record["id"] for record in predictor(named)] == ["a", "b", "c"]
    gaps = pandas.DataFrame({"text": ["bara", None, "fena"]})
    kept = [*predictor(gaps, bad_rows="keep")]
    assert [kept[0], kept[2]] == [expected[0], expected[2]] and kept[1]["row"] == 2


@pytest.mark.parametrize("data", [b"bara", 5, 2.5, None, {"bara", "cela"}, np.arange(3), np.zeros((2, 2)), object()])
def test_what_cannot_be_meant_is_refused(data, predictor):
    """Newcomer 6: what is neither a row nor rows is one clear error, not a prediction of something else."""
    with pytest.raises(DataError, match=r"^input: .*expected a text, or a list of texts or dicts, a DataFrame or a "):
        predictor(data)


def test_columns_and_a_lone_pair_are_refused(predictor, home):
    """A dict is one row, so that lists in it are no texts; a tuple could be a pair or two rows."""
    with pytest.raises(DataError, match=r"row 1: text is \['bara', 'cela'\], expected a text"):
        predictor({"text": ["bara", "cela"]})
    with pytest.raises(DataError, match=r"input: a tuple, expected a text, or .*of tuples of text and other"):
        load_predictor(str(home / "pairs"))(("bara", "cela"))
    with pytest.raises(DataError, match=r"row 2: .*is no value of a row; give texts, numbers, lists and dicts"):
        list(predictor([{"text": "bara"}, {"text": object()}]))


# Which model.


def test_a_run_stands_for_its_model(home, tmp_path):
    """Newcomer 1: `predict runs/tickets` takes the model that the run exported, or says that there is none yet."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("")
    with pytest.raises(
        RunError, match="is a run that has exported no model yet; let it end, or write one: sft-jax exp"
    ):
        load_predictor(str(run))
    (run / "model").symlink_to(home / "ours", target_is_directory=True)
    assert find_model(str(run)) == run / "model"


def test_assets_are_models(home, monkeypatch):
    """Newcomer 2: a name such as `asset:smollm2` is that of an asset."""
    monkeypatch.setattr("sft_jax.assets.resolve", lambda name: {"asset:tiny": str(home / "ours")}.get(name, name))
    assert load_predictor("asset:tiny").max_length == 24
