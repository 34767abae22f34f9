"""What a run keeps of its test split, row by row."""

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from sft_jax.config.tasks import CausalLM, MultiLabelClassification, Regression, TokenClassification
from sft_jax.data.batch import Encoded
from sft_jax.data.prepare import Prepared
from sft_jax.data.rows import numbered
from sft_jax.report import predictions as made
from sft_jax.tasks.task import Examples, Task, build_task


def predicted(task: Task, kept: np.ndarray, rows: list[int], targets: list, **more) -> list[dict]:
    """The lines of documents of one token each, of these rows; rows without one are lost."""
    columns = {"id": [f"r{row}" for row in range(len(targets))], "text": ["bara"] * len(targets)}
    table = numbered(Dataset.from_dict(columns), "test")
    documents = {name: np.asarray(value) for name, value in more.pop("documents", {}).items()}
    encoded = Encoded(
        {"input_ids": np.zeros(len(rows), np.int32)}, np.arange(len(rows) + 1), documents, rows=np.asarray(rows)
    )
    texts = (columns["text"],)
    given = Prepared(table, texts, targets, np.arange(len(targets)))
    return list(made.predictions(task, kept, Examples(encoded, texts, targets), given, **more))


@pytest.mark.parametrize("block", [1, 2, 1000])
def test_truth_and_prediction_of_each_row(monkeypatch: pytest.MonkeyPatch, block: int):
    """newcomer 12: numbers are kept in full and labels by name, in whatever blocks they are made; a row of which there
    is no document is lost, and is a line as well."""
    monkeypatch.setattr(made, "ROWS", block)
    number = build_task(Regression(kind="regression"), {})
    lines = predicted(number, np.asarray([[1.23456789], [2.5]], np.float32), [0, 2], [1.5, 7.0, 2.25])
    assert [line["truth"] for line in lines] == [1.5, 7.0, 2.25] and [line["id"] for line in lines] == [
        "r0",
        "r1",
        "r2",
    ]
    assert lines[0]["score"] == np.float32(1.23456789) and lines[1] == {
        **{"row": 2, "place": "row 2", "id": "r1", "truth": 7.0},
        "lost": True,
    }
    several = build_task(MultiLabelClassification(kind="multi_label_classification", labels=["a", "b", "c"]), {})
    lines = predicted(several, np.asarray([[9, -9, 9], [-9, -9, -9]], np.float32), [0, 1], [(1, 1, 0), (0, 0, 0)])
    assert [(line["truth"], line["labels"]) for line in lines] == [(["a", "b"], ["a", "c"]), ([], [])]


def test_tags_and_answers_in_words():
    """newcomer 12: tags stand by name, a right answer as it was given, what was answered beside it."""
    said = build_task(CausalLM(kind="causal_lm"), {})
    kept = np.asarray([[2.0, 4.0, 3.0]] * 2, np.float32)
    lines = predicted(said, kept, [0, 1], ["yes", "no"], answers=["maybe"])
    assert [line["truth"] for line in lines] == ["yes", "no"]
    assert lines[0]["answer"] == "maybe" and "answer" not in lines[1] and lines[1]["loss"] == 0.5
    tags = build_task(TokenClassification(kind="token_classification", labels=["O", "B-X"]), {})
    assert made._truth(tags.labels, (1, 0), {"tags": ["O", "O"]}) == ["B-X", "O"]
    assert made._truth((), ((3, "here"),), {"answer": "there"}) == ["here"]


def test_the_file_appears_whole(tmp_path: Path):
    """newcomer 12: a line a row, in UTF-8."""
    task = build_task(Regression(kind="regression"), {})
    table = numbered(Dataset.from_dict({"text": ["è"]}), "test")
    encoded = Encoded({"input_ids": np.zeros(1, np.int32)}, np.arange(2), {}, rows=np.zeros(1, np.int64))
    given = Prepared(table, (["è"],), [1.0], np.arange(1))
    made.write_predictions(
        tmp_path / made.FILE, task, np.ones((1, 1), np.float32), Examples(encoded, (["è"],), [1.0]), given
    )
    assert (tmp_path / made.FILE).read_text("utf-8") == '{"row": 1, "place": "row 1", "truth": 1.0, "score": 1.0}\n'
