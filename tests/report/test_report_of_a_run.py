"""What a training run leaves for its report, and that the report can neither lose the run nor be had only once."""

import json
import types

import pytest
from conftest import ONE_SHAPE, SMALL, write_model

from sft_jax import jobs, run
from sft_jax.report.page import write_report


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of one layer."""
    return write_model(tmp_path_factory.mktemp("report") / "small", SMALL)


def test_report_of_a_run(configure, model, monkeypatch):
    """The last thing a run does is its report; one that fails is said, and the run has its result all the same."""
    config = configure(f"model.source={model}", ONE_SHAPE, "train.steps=4", "eval.every=2", "report.mistakes=3")
    prepared = run.prepare(config)
    result = jobs.train(prepared)
    home = result.directory
    page = (home / "report.html").read_bytes()
    review = json.loads((home / "review.json").read_text())
    assert review["rows"] == 21 and review["headline"] == "accuracy" and 1 <= len(review["mistakes"]) <= 3
    confusion = dict(review["tables"])["confusion matrix"]
    wrong = sum(sum(row[1:]) for row in confusion[1:]) - sum(row[i] for i, row in enumerate(confusion[1:], start=1))
    assert len(review["mistakes"]) == min(3, wrong)
    rows = prepared.rows["test"]
    places = {rows.rows.place(i): text for i, text in enumerate(rows.texts[0])}
    for mistake in review["mistakes"]:
        assert [text["text"] for text in mistake["texts"]] == [places[mistake["place"]]]
    assert write_report(home).read_bytes() == page, "made again, it is another"

    def stop(path):
        raise OSError("no space left on device")

    monkeypatch.setattr(jobs, "write_report", stop)
    said = []
    note = types.SimpleNamespace(emit=lambda kind, values: said.append((kind, values["text"])))
    jobs._report(prepared, result.test, [note])
    text = f"{home}: no report was written (OSError: no space left on device); try: sft-jax report {home}"
    assert said == [("note", text)] and (home / "report.html").read_bytes() == page
