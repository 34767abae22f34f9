"""From rows to splits: the seeded, stratified cut, and every decision before and after it, counted."""

import os
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sft_jax.config.data import DataSection, Split
from sft_jax.data.prepare import Prepared, cut, prepare, read_texts
from sft_jax.data.report import DataReport
from sft_jax.data.rows import Bad, Rows
from sft_jax.errors import DataError
from sft_jax.inputs import read_rows
from sft_jax.tasks.task import Targets

SHARES = st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.3, 0.45])
CLASSES = st.lists(st.integers(0, 4), min_size=1, max_size=120)


@given(classes=CLASSES, validation=SHARES, test=SHARES, seed=st.integers(-5, 2**40))
@settings(deadline=None, max_examples=150, derandomize=True)
def test_cuts_are_disjoint_complete_and_stratified(classes, validation, test, seed):
    """R15: every row is in one split; each class is cut in the shares asked for, and trains with a row at least."""
    shares = Split(validation=validation, test=test)
    try:
        parts = cut(classes, shares, seed)
    except DataError:
        assume(False)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(classes)))
    assert set(parts) == {"train"} | {name for name in ("validation", "test") if getattr(shares, name)}
    labels = np.asarray(classes)
    assert set(labels[parts["train"]]) == set(classes), "every class trains"
    for kind in set(classes):
        count = classes.count(kind)
        for name in set(parts) - {"train"}:
            wanted, found = count * getattr(shares, name), int((labels[parts[name]] == kind).sum())
            assert found <= wanted + 0.5
            if count * (1 - validation - test) >= 1:  # enough rows that training gets its own by the shares
                assert found >= wanted - 0.5
    assert all(np.all(np.diff(rows) > 0) for rows in parts.values()), "in the order of the source"


def test_rows_that_train_are_not_tested_when_shares_are_large():
    """Two rows a class and a share that rounds to both of them still leave one of each to train on."""
    parts = cut([0, 0, 1, 1], Split(test=0.8), 0)
    assert len(parts["train"]) == 2 and len(parts["test"]) == 2
    assert not set(parts["train"]) & set(parts["test"])


def test_the_seed_alone_decides():
    """R21: the same seed cuts the same rows, whatever numpy's global state; other seeds cut others."""
    classes, shares = [0, 1, 2] * 40, Split(validation=0.1, test=0.2)
    found = []
    for seed in (0, 0, 1, 2, -1):
        np.random.seed(len(found))
        found.append({name: rows.tolist() for name, rows in cut(classes, shares, seed).items()})
    assert found[0] == found[1]
    assert len({tuple(f["test"]) for f in found}) == 4


def test_rows_of_a_class_are_drawn_not_taken_from_the_front():
    """A sorted source gives a test split from all over each class."""
    test = cut([0] * 200 + [1] * 200, Split(test=0.5), 3)["test"]
    halves = [int(((test >= begin) & (test < begin + 100)).sum()) for begin in range(0, 400, 100)]
    assert all(30 <= h <= 70 for h in halves)


def test_a_share_of_nothing_leaves_the_split_out():
    """Splits that nobody asked for do not appear, and all rows train."""
    parts = cut([0, 1] * 5, Split(), 0)
    assert list(parts) == ["train"] and parts["train"].tolist() == list(range(10))
    assert set(cut([0, 1] * 5, Split(test=0.2), 0)) == {"train", "test"}


def test_tiny_classes_stay_with_training():
    """A class of one row cannot be divided, so it trains."""
    parts = cut([0] * 20 + [1, 2], Split(validation=0.2, test=0.2), 0)
    assert {20, 21} <= set(parts["train"].tolist())
    assert len(parts["validation"]) == len(parts["test"]) == 4


@pytest.mark.parametrize("name", ["validation", "test"])
def test_a_share_of_no_row_is_an_error(name):
    """A share too small for the rows is named with its key, rather than giving an empty split."""
    with pytest.raises(DataError) as caught:
        cut([0, 0, 1, 1], Split(**{name: 0.1}), 0)
    assert str(caught.value) == f"data.split.{name}: 0.1 of 4 rows is no row; give a larger share"


# From rows to splits.


def rows_of(where: str, texts, labels=None, **more) -> Rows:
    """Rows of texts and labels, by the name of the setting that they come from."""
    columns = {"text": list(texts), "label": list(labels) if labels is not None else [0] * len(texts)}
    return Rows(Dataset.from_dict(columns), where, **more)


def targets(rows: Rows) -> Targets:
    """Labels as they stand; those below 0 are bad."""
    values = rows.column("label")
    return Targets(
        values, {i: Bad(rows.place(i), "unknown label", f"label is {v}") for i, v in enumerate(values) if v < 0}
    )


def label_counts(found) -> dict[str, int]:
    """How often there is each label."""
    return {str(label): found.count(label) for label in sorted(set(found))}


def prepared(splits, seed: int = 0, **options) -> tuple[dict[str, Prepared], DataReport]:
    """The splits by these options; each is a pair of texts and labels, or rows."""
    rows = {
        name: given if isinstance(given, Rows) else rows_of(f"data.source.{name}", *given)
        for name, given in splits.items()
    }
    section = DataSection.model_validate({"source": {"kind": "files", "train": "rows.csv"}, **options})
    return prepare(
        rows, section, lambda rows: read_texts(rows, ("text",)), targets, lambda found: found, label_counts, seed
    )


def adds_up(report: DataReport) -> bool:
    """Whether all that was read is used, went to another split, or was dropped for a reason."""
    splits = report.splits.values()
    return all(
        s.read == s.used + s.cut + sum(s.dropped.values()) == s.used + s.cut + (s.read - s.used - s.cut) for s in splits
    )


def test_bad_rows_of_all_splits_are_named_together():
    """C9: what cannot be read or has no text or target is named in one message: five a split, the rest counted."""
    broken = (Bad("a.csv, line 7", "too many fields", "5 fields, expected 2"),)
    train = rows_of("data.source.train", ["", None, "a", "b", " "], [0, 0, -1, 1, 0], bad=broken)
    test = rows_of("data.source.test", ["x"] * 9, [-1] * 8 + [0])
    with pytest.raises(DataError) as caught:
        prepared({"train": train, "test": test})
    lines = str(caught.value).splitlines()
    assert lines[0] == "data.source.train: 5 problems"
    assert lines[1:6] == [
        "  - a.csv, line 7: 5 fields, expected 2",
        "  - row 1: text is '', expected a text",
        "  - row 2: text is None, expected a text",
        "  - row 3: label is -1",
        "  - row 5: text is ' ', expected a text",
    ]
    assert lines[6] == "data.source.test: 8 problems" and lines[-2] == "  - and 3 more"
    assert lines[-1] == "mend the rows, or leave them out with data.bad_rows=drop data.most_bad=0.89"


def test_bad_rows_are_dropped_and_counted():
    """C9: dropped rows are counted by reason and shown by place, what was never a row among them."""
    broken = (Bad("a.csv, line 7", "too many fields", "5 fields, expected 2"),)
    train = rows_of("data.source.train", ["", None, *"abcdefgh"], [0, 0, -1, *range(7)], bad=broken)
    found, report = prepared({"train": train}, bad_rows="drop", most_bad=0.4)
    assert found["train"].texts == ([*"bcdefgh"],) and found["train"].targets == [*range(7)]
    assert len(found["train"].rows) == 7
    split = report.splits["train"]
    assert split.dropped == {"too many fields": 1, "no text": 2, "unknown label": 1}
    assert (split.read, split.used) == (11, 7) and adds_up(report)
    assert split.examples["no text"] == [f"row {n}: text is {v!r}, expected a text" for n, v in ((1, ""), (2, None))]
    assert split.examples["too many fields"] == ["a.csv, line 7: 5 fields, expected 2"]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (
            [-1] * 6 + [0] * 4,
            "data.source.train: 6 of 10 rows cannot be used (unknown label: 6): ",
        ),
        ([-1] * 10, "data.source.train: 10 of 10 rows cannot be used (unknown label: 10): "),
    ],
)
def test_a_wrong_column_is_no_bad_row(labels, expected):
    """C9: more than 5 % of a split are dropped only for those who ask for it; the reasons and the share are said."""
    with pytest.raises(DataError) as caught:
        prepared({"train": ([*"abcdefghij"], labels)}, bad_rows="drop")
    assert str(caught.value).startswith(expected) and "  - row 1: label is -1" in str(caught.value)
    bad = labels.count(-1)
    assert str(caught.value).endswith(
        f"\nmore than data.most_bad=0.05; check columns and files, or set data.most_bad={bad / 10:g}"
    )
    with pytest.raises(DataError, match=f"or leave them out with data.bad_rows=drop data.most_bad={bad / 10:g}$"):
        prepared({"train": ([*"abcdefghij"], labels)})
    if bad < 10:
        asked = prepared({"train": ([*"abcdefghij"], labels)}, bad_rows="drop", most_bad=bad / 10)
        assert len(asked[0]["train"]) == 10 - bad
    few = prepared({"train": ([f"text {n}" for n in range(40)], [-1, -1] + [0] * 38)}, bad_rows="drop")
    assert len(few[0]["train"]) == 38, "as many as 5 % go without asking"


def test_texts_are_cleaned_before_all_that_compares_them():
    """S10: what is left of a text is what is compared, trained on and measured; too short and too long rows go."""
    texts = ["<b>a</b>", " a ", "<br>", "bb", "c" * 9]
    rules = {"html": True, "whitespace": True, "max_chars": 8}
    found, report = prepared({"train": (texts, [0] * 5)}, clean=rules, duplicates="drop")
    assert found["train"].texts == (["a", "bb"],)
    assert report.splits["train"].dropped == {"too short": 1, "too long": 1, "duplicate": 1} and adds_up(report)
    assert report.splits["train"].examples["duplicate"] == ["row 2: 'a'"]
    found, report = prepared({"train": (texts, [0] * 5)}, clean={**rules, "min_chars": 2})
    assert found["train"].texts == (["bb"],) and report.splits["train"].dropped["too short"] == 3
    with pytest.raises(DataError, match=r"data\.source\.train: of 5 rows none is left \(too short: 5\); give others"):
        prepared({"train": (texts, [0] * 5)}, clean={"min_chars": 50})


def test_first_rows_are_counted_among_those_that_can_be_used():
    """C26: `max_rows` keeps that many rows of each split, if there are so many; the others are counted."""
    splits = {"train": (["", *"abcde"], [0] * 6), "test": ([*"xyz"], [0] * 3)}
    found, report = prepared(splits, max_rows=4, bad_rows="drop", most_bad=0.5)
    assert found["train"].texts == ([*"abcd"],) and len(found["test"]) == 3
    assert report.splits["train"].dropped == {"no text": 1, "beyond max_rows": 1} and adds_up(report)
    assert "beyond max_rows" not in report.splits["train"].examples


TWICE = {"train": ([*"aabbcda"], [0, 0, 1, 2, 1, 0, 0]), "test": ([*"cxx"], [1, 0, 0])}


@pytest.mark.parametrize(
    ("options", "train", "counts"),
    [
        ({}, "aabbcda", (2, 2, 1)),
        ({"duplicates": "drop"}, "abbcd", (2, 2, 1)),
        ({"conflicts": "drop"}, "aacda", (2, 2, 1)),
        ({"leakage": "drop"}, "aabbda", (2, 2, 1)),
        ({"duplicates": "drop", "conflicts": "drop", "leakage": "drop"}, "ad", (2, 2, 1)),
    ],
)
def test_equal_texts(options, train, counts):
    """S10: duplicates, conflicts and leaks are counted whether they stay or go, and each goes only if asked for."""
    found, report = prepared(TWICE, **options)
    assert "".join(found["train"].texts[0]) == train and adds_up(report)
    split = report.splits["train"]
    assert (split.duplicates, split.conflicts, split.leaked) == counts
    names = {"duplicates": "duplicate", "conflicts": "conflict", "leakage": "leaked"}
    assert set(split.dropped) == {names[option] for option in options}
    assert split.examples["conflict"][0].endswith("'b'") and split.examples["leaked"] == ["row 5: 'c'"]
    test = report.splits["test"]
    assert (test.duplicates, test.conflicts, test.leaked) == (1, 0, 0)
    assert len(found["test"]) == (2 if "duplicates" in options else 3), "rows that are tested stay but for duplicates"


def test_all_rows_of_a_conflict_go():
    """S10: of a text with two labels no row stays, duplicates of each among them; of validation and test all stay."""
    splits = {"train": ([*"aaab"], [0, 0, 1, 1]), "validation": ([*"xx"], [0, 1])}
    found, report = prepared(splits, conflicts="drop")
    assert found["train"].texts == (["b"],) and len(found["validation"]) == 2
    assert (report.splits["train"].conflicts, report.splits["validation"].conflicts) == (3, 2) and adds_up(report)


def test_pairs_are_equal_when_both_texts_are():
    """S10: of two columns, both count, and in their order; a joined text is not taken for another pair."""
    columns = {"text": ["a", "a", "b", "ab", "a"], "other": ["b", "b", "a", "", "c"], "label": [0] * 5}
    columns["other"][3] = "x"
    rows = Rows(Dataset.from_dict(columns), "data.source.train")
    section = DataSection.model_validate({"source": {"kind": "files", "train": "x"}, "duplicates": "drop"})
    found, _ = prepare(
        {"train": rows},
        section,
        lambda rows: read_texts(rows, ("text", "other")),
        targets,
        lambda t: t,
        label_counts,
        0,
    )
    assert list(zip(*found["train"].texts, strict=True)) == [("a", "b"), ("b", "a"), ("ab", "x"), ("a", "c")]


@given(
    texts=st.lists(st.integers(0, 12), min_size=8, max_size=60),
    labels=st.lists(st.integers(0, 2), min_size=60, max_size=60),
    keep=st.tuples(*[st.sampled_from(["keep", "drop"])] * 3),
    seed=st.integers(0, 3),
)
@settings(deadline=None, max_examples=40, derandomize=True)
def test_no_text_stands_on_two_sides_of_a_cut(texts, labels, keep, seed):
    """S10: the cut never parts equal texts, kept duplicates among them; what is tested can be kept from training."""
    train = ([f"text {n}" for n in texts], labels[: len(texts)])
    names = ("duplicates", "conflicts", "leakage")
    options = dict(zip(names, keep, strict=True)) | {"split": {"validation": 0.3}}
    try:
        found, report = prepared({"train": train, "test": (["text 0"], [0])}, seed, **options)
    except DataError:
        assume(False)
    assert adds_up(report) and list(found) == ["train", "validation", "test"]
    here, there, tested = (set(found[name].texts[0]) for name in ("train", "validation", "test"))
    assert not here & there
    assert keep[2] == "keep" or not here & tested
    if keep == ("keep",) * 3:
        everything = sorted(zip(*train, strict=True))
        rows = [
            row
            for name in ("train", "validation")
            for row in zip(found[name].texts[0], found[name].targets, strict=True)
        ]
        assert sorted(rows) == everything
    assert report.splits["train"].cut == report.splits["validation"].read == len(found["validation"])


def test_a_cut_of_texts_that_are_all_different_is_that_of_rows():
    """R21: what a seed cut before texts were compared, it still cuts: published results depend on it."""
    labels, shares = [0, 1, 2] * 20, Split(validation=0.2, test=0.1)
    found, _ = prepared({"train": ([f"text {n}" for n in range(60)], labels)}, 5, split=shares.model_dump())
    for name, rows in cut(labels, shares, 5).items():
        assert found[name].texts[0] == [f"text {n}" for n in rows]
    assert cut(labels, shares, 5)["test"].tolist() == [12, 21, 31, 40, 47, 50]


def test_few_labels():
    """S13: `per_class` draws that many rows of each class, or all there are; more rows hold the fewer, seeds differ."""
    labels = [0] * 50 + [1] * 20 + [2] * 3
    rows = {"train": ([f"text {n}" for n in range(73)], labels), "test": (["x"] * 9, [0] * 9)}
    found, report = prepared(rows, per_class=5)
    assert report.splits["train"].labels == {"0": 5, "1": 5, "2": 3} and len(found["test"]) == 9
    assert report.splits["train"].dropped == {"not drawn": 60} and adds_up(report)
    numbers = [int(text.split()[1]) for text in found["train"].texts[0]]
    assert numbers == sorted(numbers), "in the order of the source"
    more = set(prepared(rows, per_class=10)[0]["train"].texts[0])
    assert set(found["train"].texts[0]) < more
    others = {tuple(prepared(rows, seed, per_class=5)[0]["train"].texts[0]) for seed in range(4)}
    assert len(others) == 4
    assert prepared(rows, per_class=5)[0]["train"].texts == found["train"].texts


def test_as_many_are_drawn_as_can_be_trained_on():
    """S13: rows are drawn after all others are dropped and cut, so that there are as many of a class as asked for."""
    texts = [f"text {n // 2}" for n in range(80)]
    options = {"duplicates": "drop", "leakage": "drop", "split": {"validation": 0.25}, "per_class": 6}
    rows = {"train": (texts, [n // 2 % 2 for n in range(80)]), "test": (texts[:20], [0] * 20)}
    _, report = prepared(rows, **options)
    assert report.splits["train"].labels == {"0": 6, "1": 6} and adds_up(report)


def test_nothing_left_is_an_error():
    """C9: where every row of a split is dropped, the counts by reason say why."""
    with pytest.raises(
        DataError, match=r"data\.source\.train: of 2 rows none is left \(leaked: 2\); give others, or drop"
    ):
        prepared({"train": ([*"ab"], [0, 1]), "test": ([*"ab"], [0, 1])}, leakage="drop")
    with pytest.raises(DataError, match=r"data\.source\.train: of 2 rows none is left \(conflict: 2\)"):
        prepared({"train": ([*"aa"], [0, 1])}, conflicts="drop")
    with pytest.raises(DataError, match=r"data\.source\.test: of 0 rows none is left \(there was none\)"):
        prepared({"train": ([*"ab"], [0, 1]), "test": ([], [])})


def test_places_and_parts_follow_the_rows():
    """A row that stays knows its file, line and part, whatever was dropped before it."""
    part = np.array([0, 1, 0, 1], np.int32)
    places = {"files": ("a.csv, line", "b.csv, line"), "file": part, "line": np.array([2, 2, 3, 9])}
    train = rows_of("data.source.train", [*"aabc"], [0] * 4, part=part, **places)
    found, _ = prepared({"train": train}, duplicates="drop")
    rows = found["train"].rows
    assert [rows.place(n) for n in range(3)] == ["a.csv, line 2", "a.csv, line 3", "b.csv, line 9"]
    assert rows.part is not None and rows.part.tolist() == [0, 0, 1]


PROCESS = """
from types import SimpleNamespace
from datasets import Dataset
from sft_jax.config.data import DataSection
from sft_jax.data.prepare import prepare, read_texts
from sft_jax.data.rows import Rows
columns = {"text": [f"text {n % 70}" for n in range(90)], "label": [f"{n % 3}" for n in range(90)]}
options = {"duplicates": "drop", "conflicts": "drop", "split": {"validation": 0.2}, "per_class": 7}
section = DataSection.model_validate({"source": {"kind": "files", "train": "x"}, **options})
rows = {"train": Rows(Dataset.from_dict(columns), "data.source.train")}
targets = lambda rows: SimpleNamespace(values=rows.column("label"), bad={})
numbers, counts = lambda found: [int(v) for v in found], lambda found: {"0": found.count("0")}
found, report = prepare(rows, section, lambda rows: read_texts(rows, ("text",)), targets, numbers, counts, 3)
print([part.texts for part in found.values()], report)
"""


def test_every_process_prepares_the_same():
    """C32: hash seeds, which differ from process to process, change neither rows nor report."""
    outputs = set()
    for hash_seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", PROCESS], env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        outputs.add(done.stdout)
    assert len(outputs) == 1 and "text 3" in outputs.pop()


def test_the_split_has_a_seed_of_its_own(configure):
    """A sweep over `seed.data` keeps the rows of each split where `seed.split` is given, and draws others where not."""

    def cut_by(*seeds: str) -> dict[str, list[str]]:
        alone = ("data.source.validation=null", "data.source.test=null", "data.split.validation=0.3")
        return {split: part.texts[0] for split, part in read_rows(configure(*alone, *seeds))[1].items()}

    assert cut_by("seed.data=3", "seed.split=0") == cut_by() != cut_by("seed.data=3")
    assert cut_by("seed.data=3") == cut_by("seed.split=3") == cut_by("seed=3"), "old configurations keep their splits"
