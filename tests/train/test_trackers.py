"""What other programs are told: TensorBoard's event files, read back by TensorBoard, and Weights & Biases."""

import importlib.machinery
import json
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sft_jax.config.schema import ReportSection
from sft_jax.errors import ConfigError
from sft_jax.train.report import MetricsFile
from sft_jax.train.trackers import Events, Wandb, check

GROUPS = {"groups": {"a": {"f1": 0.25}, "b": {"f1": 0.75}}}


def go_on(home, step) -> list:
    """The file of metrics and the events, of a process that goes on after a step."""
    return [MetricsFile(home / "metrics.jsonl", step), Events(home / "events", home / "metrics.jsonl")]


def emit(sinks, kind, step, **values) -> None:
    """One event for all."""
    for sink in sinks:
        sink.emit(kind, {"step": step, **values})


def read(home) -> dict[str, list[tuple[int, float]]]:
    """Tag -> steps and values, as TensorBoard reads them."""
    found = EventAccumulator(str(home / "events"), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_events_are_read_by_tensorboard(tmp_path):
    """Every number of every event is a scalar at its step, those of groups too; texts and notes are none."""
    sinks = go_on(tmp_path, 0)
    emit(sinks, "train", 2, loss=0.5, tokens=7)
    emit(sinks, "validation", 2, split="validation", f1=0.5, **GROUPS)
    emit(sinks, "train", 4, loss=0.25, tokens=9)
    emit(sinks, "test", 2, split="test", f1=0.125)
    for sink in sinks:
        sink.emit("note", {"text": "compiled"})
        sink.emit("done", {})
    assert read(tmp_path) == {
        "train/loss": [(2, 0.5), (4, 0.25)],
        "train/tokens": [(2, 7.0), (4, 9.0)],
        "validation/f1": [(2, 0.5)],
        "validation/a/f1": [(2, 0.25)],
        "validation/b/f1": [(2, 0.75)],
        "test/f1": [(2, 0.125)],
    }


def test_repeated_steps_stand_once(tmp_path):
    """R56: over processes that were killed and went on, each step stands in the events once, the test too."""
    for after, steps in ((0, (2, 4, 6)), (4, (6, 8)), (8, ())):
        sinks = go_on(tmp_path, after)
        for step in steps:
            emit(sinks, "train", step, loss=float(step + 100 * after))
        if after:
            emit(sinks, "test", 4, f1=0.5)
    (file,) = (tmp_path / "events").iterdir()
    assert "tfevents" in file.name
    assert read(tmp_path) == {"train/loss": [(2, 2.0), (4, 4.0), (6, 406.0), (8, 408.0)], "test/f1": [(4, 0.5)]}


@pytest.mark.parametrize("harm", ["cut", "garbage", "leftover"])
def test_events_survive_a_killed_process(tmp_path, harm):
    """R3: event files that were cut off, broken or half made anew are replaced by what the metrics say."""
    emit(go_on(tmp_path, 0), "train", 2, loss=0.5)
    (file,) = (tmp_path / "events").iterdir()
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-5])
    elif harm == "garbage":
        file.write_bytes(b"\0" * 100)
    else:
        (tmp_path / "events" / ".new.17").write_bytes(file.read_bytes())
    emit(go_on(tmp_path, 2), "train", 4, loss=0.25)
    assert read(tmp_path) == {"train/loss": [(2, 0.5), (4, 0.25)]}
    assert len(list((tmp_path / "events").iterdir())) == 1


class Client:
    """The package wandb, as far as it is used: notes what it is told, and goes on with a run that it knows."""

    def __init__(self, monkeypatch):
        self.runs, self.begun = {}, []
        module = types.ModuleType("wandb")
        module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        module.init, module.Settings, module.Error = self.init, dict, LookupError
        monkeypatch.setitem(sys.modules, "wandb", module)

    def init(self, **given):
        """Begin or go on."""
        if given["project"] == "forbidden":
            raise LookupError("api_key not configured (no-tty)\ncall wandb.login")
        self.begun.append(given)
        run = self.runs.setdefault(given["id"], types.SimpleNamespace(step=-1, logged=[], summary={}, finished=0))
        run.step += 1  # where a run goes on, after all that it has

        def log(values, step):
            run.logged.append((step, values))
            run.step = step

        def finish():
            run.finished += 1

        run.log, run.finish = log, finish
        return run


def test_wandb(tmp_path, monkeypatch):
    """R56, R37: a resumed run goes on under its name, no step is sent twice, and no key reaches a file."""
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    client = Client(monkeypatch)
    home = tmp_path / "run"
    home.mkdir()
    for after, steps in ((0, (2, 4, 6)), (4, (6, 8))):
        sink = Wandb("project", home, {"optim": {"lr": 1.0}})
        for step in steps:
            sink.emit("train", {"step": step, "loss": float(step + 100 * after)})
            sink.emit("validation", {"step": step, "f1": 0.5})
    sink.emit("test", {"step": 4, "split": "test", "f1": 0.5})
    sink.emit("note", {"text": "a secret text"})
    sink.emit("done", {})
    one, other = client.begun
    assert (
        one["id"] == other["id"] and one["resume"] == "allow" and one["name"] == "run" and one["project"] == "project"
    )
    (run,) = client.runs.values()
    assert [step for step, _ in run.logged] == [2, 2, 4, 4, 6, 6, 8, 8]
    assert run.logged[-2:] == [(8, {"train/loss": 408.0}), (8, {"validation/f1": 0.5})]
    assert run.summary == {"test/f1": 0.5} and run.finished == 1
    written = "".join(file.read_text() for file in home.iterdir())
    assert "canary" not in written + json.dumps(client.begun, default=str) + str(run.logged)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Wandb("project", elsewhere, {})
    assert client.begun[-1]["id"] != one["id"]


def test_wandb_that_is_not_installed(monkeypatch):
    """Asked for and not installed, it is refused with what to type; not asked for, nobody looks."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"report\.wandb: the package wandb is not installed; pip install wandb"):
        check(ReportSection(wandb="project"))
    check(ReportSection())


def test_wandb_that_refuses(tmp_path, monkeypatch):
    """What the client cannot begin is said in one line, with the remedy, before anything is trained."""
    Client(monkeypatch)
    with pytest.raises(ConfigError, match=r"^report\.wandb: api_key not configured \(no-tty\); log in with .*offline$"):
        Wandb("forbidden", tmp_path, {})
