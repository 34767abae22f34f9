"""Rows that nobody would collect, on the whole way to a prepared run: texts, labels and counts of any kind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ONE_SHAPE, SMALL, WORDS, write_model
from hostile import budget, told
from hypothesis import given
from hypothesis import strategies as st

from sft_jax.config.read import read_config
from sft_jax.errors import SftError
from sft_jax.run import Run, prepare

TEXTS = (
    "😀👨‍👩‍👧‍👦🏳️‍🌈", "\u202eשלום עולם", "مرحبا",
    "a\0b", "\ud800", "\udfff x", "\ufeff", "é" * 99, "\r\n\t", " ", "", "\u2028",
    "x" * 20_000, "word " * 3_000, "[CLS] [SEP] [PAD]", "<script>&amp;", "NaN", "=1+1", "\x1b[31m",
)  # fmt: skip
other = st.none() | st.integers() | st.floats() | st.booleans() | st.lists(st.text(max_size=2), max_size=2)
texts = st.sampled_from(WORDS) | st.sampled_from(TEXTS) | st.text(max_size=8) | other
labels = (
    st.integers(0, 2)
    | st.sampled_from(["a", "b", "", " ", "0", "1", "a,b", ",", "\0", "\ud800", "NaN", "x" * 5000, "😀"])
    | st.integers() | st.floats() | st.none() | st.booleans()
    | st.lists(st.sampled_from(["a", "b", 1, None]), max_size=3)
    | st.dictionaries(st.just("k"), st.integers(), max_size=1)
)  # fmt: skip
likely = st.fixed_dictionaries({"text": st.sampled_from(WORDS), "label": st.sampled_from([0, 1])})
odd = st.fixed_dictionaries({}, optional={"text": texts, "label": labels, "more": texts})
rows = st.lists(likely | odd, max_size=8) | st.lists(odd, max_size=4) | st.lists(likely, min_size=4, max_size=12)
TASKS = (
    "{kind: sequence_classification}",
    "{kind: sequence_classification, text_pair: more}",
    "{kind: sequence_classification, labels: [a, b]}",
    "{kind: sequence_classification, class_weights: balanced}",
    "{kind: multi_label_classification, label: label}",
    "{kind: multi_label_classification, label: label, class_weights: balanced}",
    "{kind: regression, label: label}",
)
OPTIONS = (
    "data.bad_rows=drop", "data.split.test=0.3", "data.per_class=1", "data.max_rows=3", "data.duplicates=drop",
    "data.conflicts=drop", "data.leakage=drop", "data.clean={unicode: NFKC, html: true, whitespace: true}",
    "data.clean.max_chars=5", "data.layout.kind=packed", "data.max_length=3", "train.batch_size=1", "eval.group=more",
    "data.augment.delete=0.5",
)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny model; each example writes its rows anew."""
    home = tmp_path_factory.mktemp("rows")
    write_model(home / "model", SMALL)
    return home


def prepared(home: Path, task: str, given_rows: Callable[[Path], Path], options: list[str]) -> Run | None:
    """The run on these rows, or None where they are refused in the right form."""
    file = given_rows(home)
    try:
        config = read_config(
            [],
            [f"run.dir={home / 'run'}", f"model.source={home / 'model'}", f"task={task}", "data.source.kind=files",
             f"data.source.train={file}", "eval.every=never", "data.max_length=32", "data.cache=false", ONE_SHAPE,
             "mesh.data=1", "train.batch_size=2", "eval.best_metric=loss", *options],
        )  # fmt: skip
        return prepare(config)
    except SftError as error:
        told(error)
        return None


def as_json(content: list[dict[str, Any]]) -> Callable[[Path], Path]:
    """Write them as JSON lines: the one form that can hold every one of these values."""

    def write(home: Path) -> Path:
        (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        return home / "rows.jsonl"

    return write


def as_csv(content: list[dict[str, Any]]) -> Callable[[Path], Path]:
    """Write them as CSV without any quoting, so that delimiters and line ends within a value break the rows."""

    def write(home: Path) -> Path:
        lines = [
            "text,label,more",
            *(",".join(str(row.get(k, "")) for k in ("text", "label", "more")) for row in content),
        ]
        (home / "rows.csv").write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
        return home / "rows.csv"

    return write


@given(rows, st.sampled_from(TASKS), st.sampled_from([as_json, as_csv]), st.lists(st.sampled_from(OPTIONS), max_size=3))
@budget(60)
def test_any_rows(home: Path, content: list[dict[str, Any]], task: str, form: Any, options: list[str]):
    """Whatever the rows hold, a run is prepared from them or they are refused in words; no number in it is not one."""
    run = prepared(home, task, form(content), options)
    if run is not None:
        batch = run.batches[0]
        assert batch["weight"].sum() > 0
        assert int(batch["input_ids"].max()) < run.model.limits["input_ids"] and int(batch["input_ids"].min()) >= 0


@pytest.mark.parametrize("task", TASKS)
def test_rows_that_are_all_bad(home: Path, task: str):
    """No row, one row, one class, all rows bad, dropped or not: each is refused in words or prepared."""
    good = {"text": "bara", "more": "cela", "label": 0}
    for content in (
        [],
        [good],
        [good] * 5,
        [{"text": None, "label": None, "more": None}] * 5,
        [{"label": 1}, {"text": "a"}],
    ):
        for options in ([], ["data.bad_rows=drop"], ["data.split.test=0.5"]):
            prepared(home, task, as_json(content), options)
