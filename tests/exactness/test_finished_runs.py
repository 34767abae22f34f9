"""What is done with a run that is done: looked at again, begun again, gone on with, its predictions read."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ONE_SHAPE, SMALL, write_model, write_rows
from exact_runs import losses_by_step, metrics_lines, settings, train_until
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from sft_jax import jobs
from sft_jax.cli import app
from sft_jax.config.read import write_config
from sft_jax.errors import ConfigError, RunError
from sft_jax.jobs import evaluate, export, train
from sft_jax.run import open_run, prepare

SHORT = (ONE_SHAPE, "train.epochs=1", "train.log_every=100")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model and rows."""
    home = tmp_path_factory.mktemp("files")
    write_model(home / "model", SMALL)
    for seed, (split, count) in enumerate((("train", 40), ("validation", 21), ("test", 21))):
        write_rows(home / f"{split}.csv", count, seed)
    return home


@pytest.fixture(scope="module")
def done(files: Path) -> Path:
    """A run of one epoch, 5 steps and so shorter than `train.log_every`, that is done."""
    train(prepare(settings(files / "done", files / "model", files, *SHORT)))
    return files / "done"


@pytest.fixture
def elsewhere(files: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another directory with a run that names its files as seen from there, and copies of these."""
    for name in ("model", "done"):
        shutil.copytree(files / name, tmp_path / name)
    for split in ("train", "validation", "test"):
        shutil.copy(files / f"{split}.csv", tmp_path)
    config = settings(Path("done"), Path("model"), files, *SHORT)
    source = config.data.source.model_copy(update={s: f"{s}.csv" for s in ("train", "validation", "test")})
    model = config.model.model_copy(update={"source": "./model"})
    config = config.model_copy(update={"data": config.data.model_copy(update={"source": source}), "model": model})
    (tmp_path / "done" / "config.yaml").write_text(write_config(config))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change_row(file: Path) -> None:
    """One label of a file becomes the other."""
    lines = file.read_text().splitlines()
    lines[3] = lines[3][:-1] + ("0" if lines[3].endswith("1") else "1")
    file.write_text("\n".join(lines) + "\n")


def change_weight(file: Path) -> None:
    """One number of the weights becomes another."""
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + np.float32(0.25)
    save_file(tensors, file)


def change_config(file: Path) -> None:
    """Another activation: the same shapes, other numbers."""
    file.write_text(file.read_text().replace('"gelu"', '"relu"'))


def test_a_run_is_looked_at_from_anywhere(elsewhere: Path):
    """Fault L: from another directory with the same files under its names, a run scores as it did."""
    scores, _ = evaluate(open_run(Path("done")), "test")
    assert scores.metrics == json.loads(Path("done/summary.json").read_text())["test"]
    assert export(open_run(Path("done")), Path("out")) == 5


@pytest.mark.parametrize(
    ("file", "change", "split", "problem"),
    [
        ("validation.csv", change_row, "validation", "data: validation is"),
        ("test.csv", change_row, "test", "data: test is"),
        ("train.csv", change_row, "test", "data: train is"),
        ("model/model.safetensors", change_weight, "test", "weights: model.safetensors is"),
        ("model/config.json", change_config, "test", "weights: config.json is"),
        ("model/tokenizer.json", lambda f: f.write_text(f.read_text() + "\n"), "test", "tokenizer:"),
    ],
)
def test_a_run_is_not_scored_on_what_it_did_not_read(elsewhere: Path, file: str, change, split: str, problem: str):
    """Fault L: rows, weights, sizes and tokenizer that are others under the same name are refused by name, by
    `evaluate`, by `export` where they are of what it reads, and by `train`."""
    change(elsewhere / file)
    with pytest.raises(RunError) as caught:
        evaluate(open_run(Path("done")), split)
    lines = str(caught.value).splitlines()
    assert lines[0] == "done: put back what it reads, or give another run: 1 problem"
    assert lines[1:] == [f"  - {problem} not what the run was trained with"]
    if "validation" in file:
        evaluate(open_run(Path("done")), "test")  # the split that is asked for, and what was trained on, are as before
    elif "test" not in file:
        with pytest.raises(RunError, match=problem):
            export(open_run(Path("done")), Path("out"))
    with pytest.raises(RunError, match=problem):
        train(open_run(Path("done")))


def test_labels_of_another_name_are_seen(elsewhere: Path):
    """Fault L, the kind: rows whose labels are called otherwise have the same numbers, and are other rows."""
    for split in ("train", "validation", "test"):
        file = elsewhere / f"{split}.csv"
        rows = [line.rpartition(",") for line in file.read_text().splitlines()]
        named = {"0": "no", "1": "yes", "label": "label"}
        file.write_text("\n".join(f"{text},{named[label]}" for text, _, label in rows) + "\n")
    with pytest.raises(RunError, match=r"  - task: not what the run was trained with"):
        evaluate(open_run(Path("done")), "test")


def test_a_run_of_one_interval_has_a_speed(done: Path):
    """newcomer S1: 5 steps with `train.log_every` of 100 have the speed of their one line of metrics, not 0."""
    [line] = [json.loads(text) for text in (done / "metrics.jsonl").read_text().splitlines() if '"train"' in text]
    speed = json.loads((done / "summary.json").read_text())["tokens_per_second"]
    assert speed == pytest.approx(line["tokens_per_second"], rel=1e-3) and speed > 0


@pytest.mark.parametrize("summed_up", [True, False])
def test_a_run_that_is_done_keeps_its_summary(elsewhere: Path, summed_up: bool):
    """newcomer S1: the same command again leaves seconds and speed as they were, in summary and report; where the
    process was killed before it summed up, they are those that its ledger and its metrics tell of."""
    before = json.loads(Path("done/summary.json").read_text())
    assert before["seconds"]["train"] > 0
    if not summed_up:
        Path("done/summary.json").unlink()
    result = train(open_run(Path("done")))
    after = json.loads(Path("done/summary.json").read_text())
    assert result.summary == after
    if summed_up:
        assert after == before
    else:
        assert after["tokens_per_second"] == pytest.approx(before["tokens_per_second"], rel=1e-3)
        assert 0 < after["seconds"]["train"] < before["seconds"]["train"] + 1  # compiling is not in it here
        assert after["seconds"]["total"] > after["seconds"]["train"]
    shown = Path("done/report.html").read_text()
    assert f"{after['tokens_per_second']:,.0f}" in shown


def test_more_epochs_are_gone_on_with(files: Path, done: Path, tmp_path: Path):
    """Case 22: a run of one epoch that is done goes on to three by `run.extend`: the rows of each step are those of a
    run of three from the start, the learning rate is that of three from there on and is told, the manifest has it."""
    shutil.copytree(done, tmp_path / "run")
    more = settings(tmp_path / "run", files / "model", files, ONE_SHAPE, "train.epochs=3")
    with pytest.raises(RunError) as caught:
        prepare(more)
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'run'} holds another run; give another run.dir, to go on with more steps: run.extend=true: "
        "1 problem",
        "  - train.epochs: 1.0 there, 3.0 now",
    ]
    extended = settings(tmp_path / "run", files / "model", files, ONE_SHAPE, "train.epochs=3", "run.extend=true")
    told: list[str] = []

    class Told:
        def emit(self, kind, values):
            told.extend([values["text"]] if kind == "note" else [])

        def stop(self):
            pass

    result = train(prepare(extended), Told())  # type: ignore[arg-type]
    assert result.steps == 15
    [line] = [text for text in told if text.startswith("extended")]
    # Linear: the fifth step of 5 is at a fifth of 1e-3, the sixth of 15 at ten fifteenths.
    assert line == (
        "extended from 5 to 15 steps, goes on at step 6; the learning rate is 6.667e-04 there, as in a schedule of "
        "15 steps, and was 2.000e-04 at the step before"
    )
    rates = {e["step"]: e["lr"] for e in metrics_lines(tmp_path / "run") if e["kind"] == "train"}
    assert rates[5] == pytest.approx(1e-3 / 5) and rates[6] == pytest.approx(1e-2 / 15)
    whole = prepare(settings(tmp_path / "whole", files / "model", files, ONE_SHAPE, "train.epochs=3"))
    mine = prepare(extended).batches
    for step in range(15):
        assert all(np.array_equal(mine[step][name], found) for name, found in whole.batches[step].items())
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    [entry] = manifest["extensions"]
    assert (entry["step"], entry["before"], entry["after"]) == (5, 5, 15)
    assert "epochs: 3.0" in (tmp_path / "run" / "config.yaml").read_text()
    assert evaluate(open_run(tmp_path / "run"), "test")[0].metrics == result.test.metrics  # type: ignore[union-attr]
    again = train(prepare(more))  # no more than there is, and nothing is trained
    assert again.steps == 15 and again.summary == result.summary


def test_what_was_extended_may_be_stopped(files: Path, done: Path, tmp_path: Path):
    """Case 22, C11: stopped at the first steps of an extension, and even before any, a run goes on bit for bit as one
    that was not stopped there."""
    for name in ("one", "other"):
        shutil.copytree(done, tmp_path / name)
    longer = ("train.epochs=2", "train.log_every=1", "run.extend=true")
    one, other = (settings(tmp_path / n, files / "model", files, ONE_SHAPE, *longer) for n in ("one", "other"))
    jobs.begin_directory(prepare(one))  # killed as soon as that was written down
    train_until(one, 8)
    for config in (one, other):
        assert train(prepare(config)).steps == 10
    assert losses_by_step(tmp_path / "one") == losses_by_step(tmp_path / "other")
    assert (tmp_path / "one/model/model.safetensors").read_bytes() == (
        tmp_path / "other/model/model.safetensors"
    ).read_bytes()


def test_what_cannot_be_extended(files: Path, done: Path):
    """Case 22: fewer steps, other settings beside more steps, no run, and a beginning anew are each refused."""
    with pytest.raises(RunError, match=r"was to have 5 steps, and 3 are fewer; give more"):
        jobs.begin_directory(
            prepare(settings(done, files / "model", files, *SHORT, "train.steps=3", "run.extend=true"))
        )
    with pytest.raises(RunError) as caught:
        prepare(settings(done, files / "model", files, *SHORT, "train.epochs=2", "optim.lr=1", "run.extend=true"))
    assert str(caught.value).splitlines()[1:] == ["  - optim.lr: 0.001 there, 1.0 now"]
    with pytest.raises(RunError, match=r"holds no run, and run\.extend goes on with one"):
        train(prepare(settings(done.with_name("none"), files / "model", files, *SHORT, "run.extend=true")))
    with pytest.raises(ConfigError, match="extend: goes on, and resume=restart does not"):
        settings(done, files / "model", files, "run.extend=true", "run.resume=restart")


def test_a_dry_run_leaves_the_run_directory_alone(files: Path, done: Path, tmp_path: Path):
    """newcomer S2: what a step needs is said whatever the run directory holds; no change is named that nobody made."""
    config = settings(done, files / "model", files, *SHORT)
    (tmp_path / "c.yaml").write_text(write_config(config))
    before = sorted((file, file.stat().st_mtime_ns) for file in done.rglob("*"))
    found = CliRunner().invoke(app, ["train", "--dry-run", str(tmp_path / "c.yaml"), "train.batch_size=4"])
    assert found.exit_code == 0 and "A step" in found.output
    assert sorted((file, file.stat().st_mtime_ns) for file in done.rglob("*")) == before


def test_predictions_of_the_test_split_are_kept(files: Path, done: Path):
    """newcomer 12: a line for each test row with its place, truth, label and scores, which give the accuracy again."""
    lines = [json.loads(line) for line in (done / "predictions.jsonl").read_text().splitlines()]
    with open(files / "test.csv", newline="") as source:
        rows = list(csv.DictReader(source))
    assert [line["row"] for line in lines] == list(range(1, len(rows) + 1))
    assert [line["place"] for line in lines[:2]] == [f"{files}/test.csv, line {number}" for number in (2, 3)]
    assert [line["truth"] for line in lines] == [row["label"] for row in rows]
    assert all(math.isclose(sum(line["scores"].values()), 1, abs_tol=1e-5) for line in lines)
    right = np.mean([line["truth"] == line["label"] for line in lines])
    assert right == pytest.approx(json.loads((done / "summary.json").read_text())["test"]["accuracy"])
