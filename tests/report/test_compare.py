"""Several runs side by side: scores, what differs, and the curves of all in one picture."""

import json
import re

import pytest
from made_runs import make_run

from sft_jax.errors import ConfigError, RunError
from sft_jax.report.compare import compare, write_comparison


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs that differ in a setting and in their data, and one that is not finished."""
    home = tmp_path_factory.mktemp("compare")
    done = [make_run(home / name, rows=50, seed=seed) for seed, name in enumerate(("one", "other"))]
    return [*done, make_run(home / "going", rows=50, finished=False)]


def test_scores(runs):
    """A row for each run, with the metric that picked its best step, its headline and its baselines."""
    found = compare(runs).scores
    asked = ["validation f1_macro", "test f1_macro", "validation accuracy", "test accuracy"]
    baselines = ["majority class", "TF-IDF + logistic regression"]
    assert found.heading == ["run", "steps", "best", *asked, *baselines, "tokens/s", "seconds"]
    assert found.rows[0] == ["one", 400, 300, 0.8268, 0.75, None, 0.8125, 0.5, 0.6875, 12346, 70]
    assert found.rows[1][:2] == ["other", 400] and found.rows[1][6] == 0.6875 and found.rows[1][-2] == 12347
    going = found.rows[2]
    assert going[:3] == ["going (not finished)", 400, None] and going[3] == 1 - 3 / 400**0.5 and going[-1] is None


def test_what_no_run_has(runs, tmp_path):
    """Columns that would be empty are left out: of runs that are not finished, all that comes at the end."""
    other = make_run(tmp_path / "other", finished=False)
    assert compare([runs[2], other]).scores.heading == ["run", "steps", "validation f1_macro"]


def test_metrics_that_are_asked_for(runs):
    """What is asked for is shown alone; a metric that no run has is named, with the closest spelling."""
    assert compare(runs, ["loss"]).scores.heading[3:5] == ["validation loss", "test loss"]
    with pytest.raises(
        ConfigError, match=r"--metric .*1 problem\n  - no run has a metric 'acuracy'; did you mean 'acc"
    ):
        compare(runs, ["loss", "acuracy"])


def test_only_what_differs(runs):
    """R52: of settings and manifests exactly the keys that differ are shown; equal runs show none."""
    found = compare(runs[:2])
    assert found.settings.rows == [["optim.lr", "0.001", "0.002"]]
    assert [row[0] for row in found.manifests.rows] == [
        f"data.{split}.{what}" for split in ("test", "train") for what in ("rows", "sha256")
    ]
    assert all(len(cell) <= 32 for row in found.manifests.rows for cell in row)
    same = compare([runs[0], runs[2]])
    assert same.settings.rows == [] and same.manifests.rows == []


def test_what_cannot_be_compared(runs, tmp_path):
    """One run alone, the same one twice, and directories without a run are refused; the last all at once."""
    for paths in ([runs[0]], [runs[0], runs[0].parent / "." / "one"]):
        with pytest.raises(ConfigError, match="give two run directories or more, each once"):
            compare(paths)
    with pytest.raises(RunError, match=r"compare: 2 problems\n  - .*nowhere: holds no run .*\n  - .*holds no run"):
        compare([runs[0], tmp_path / "nowhere", tmp_path])


def test_names(runs, tmp_path):
    """Runs whose directories are called the same are told apart by their paths."""
    twin = make_run(tmp_path / "one", rows=50)
    assert compare([runs[0], runs[1]]).names == ["one", "other"]
    assert compare([runs[0], twin]).names == [str(runs[0]), str(twin)]


def test_page(runs, tmp_path):
    """The page overlays the curves of all runs by name, and shows the tables; a run without validation has none."""
    metrics = runs[2] / "metrics.jsonl"
    before = metrics.read_text()
    metrics.write_text("".join(f"{line}\n" for line in before.splitlines() if json.loads(line)["kind"] == "train"))
    write_comparison(compare(runs), tmp_path / "compared.html")
    metrics.write_text(before)
    text = (tmp_path / "compared.html").read_text()
    assert re.findall(r"<figcaption>(.*?)</figcaption>", text) == [
        "Train loss",
        "Validation loss",
        "Validation f1_macro",
    ]
    legends = [re.findall(r"var\(--c(\d)\)\"></i>(.*?)</li>", part) for part in text.split("<figcaption>")[1:]]
    assert legends[0] == [("1", "one"), ("2", "other"), ("3", "going")]
    assert legends[1] == legends[2] == [("1", "one"), ("2", "other")]
    assert "optim.lr" in text and "Settings that differ" in text and "<script" not in text
    with pytest.raises(RunError, match=r"cannot be written .*; give another --html"):
        write_comparison(compare(runs), tmp_path / "no" / "where.html")
