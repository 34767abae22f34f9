"""What other programs are told of a run: TensorBoard's event files, always, and Weights & Biases if asked.

Both are sinks of the same events as `metrics.jsonl`. Their libraries are imported when a run begins, and no sooner.
"""

import importlib.util
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_jax.config.schema import ReportSection
from sft_jax.errors import ConfigError
from sft_jax.train.report import METRICS, Values, read_metrics


def check(section: ReportSection) -> None:
    """Refuse what could not be sent, before anything is trained."""
    if section.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError("report.wandb: the package wandb is not installed; pip install wandb, or leave it out")


class Events:
    """Event files of TensorBoard: every number under `kind/name` (and `kind/group/name`), by step.

    They are made anew of `metrics.jsonl` whenever a process begins, so that a step which is repeated, or was lost with
    a process that was killed, stands in them once; the times of earlier events are then those of writing them again.
    """

    def __init__(self, home: Path, metrics: Path):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._protos: Any = event_pb2, summary_pb2
        self._writer = RecordWriter
        home.mkdir(exist_ok=True)
        before = set(home.iterdir())
        self._file = home / f".new.{time.time_ns()}"
        self._append(file_version="brain.Event:2")
        for event in read_metrics(metrics):
            self.emit(event["kind"], event)
        self._file = self._file.rename(home / f"events.out.tfevents.{self._file.suffix[1:]}")
        for file in before:
            file.unlink()

    def emit(self, kind: str, values: Values) -> None:
        """Append training and evaluation metrics."""
        if kind in METRICS:
            self._append(step=values["step"], summary=self._summary(_scalars(kind, values)))

    def _summary(self, scalars: Mapping[str, float]) -> Any:
        message = self._protos[1].Summary
        return message(value=[message.Value(tag=tag, simple_value=value) for tag, value in scalars.items()])

    def _append(self, **content: Any) -> None:
        event = self._protos[0].Event(wall_time=time.time(), **content)
        with open(self._file, "ab") as sink:
            self._writer(sink).write(event.SerializeToString())


class Wandb:
    """A run of Weights & Biases: the configuration and every number, no texts and no rows.

    Its name there is kept in the run directory, so that a resume goes on in it; steps that it has are not sent again.
    """

    def __init__(self, project: str, home: Path, config: Mapping[str, Any]):
        import wandb

        name = home / "wandb.id"
        if not name.is_file():
            name.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
        try:
            self._run = wandb.init(
                project=project,
                id=name.read_text(encoding="utf-8").strip(),
                name=home.name,
                dir=str(home),
                config=dict(config),
                resume="allow",
                settings=wandb.Settings(console="off", disable_code=True, disable_git=True),
            )
        except wandb.Error as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"report.wandb: {reason}; log in with `wandb login`, or set WANDB_MODE=offline") from None

    def emit(self, kind: str, values: Values) -> None:
        """Send training and evaluation metrics; the test's become the summary, and `done` ends the run there."""
        scalars = _scalars(kind, values) if kind in METRICS else {}
        if kind == "test":
            self._run.summary.update(scalars)
        elif scalars and values["step"] >= self._run.step:
            self._run.log(scalars, step=values["step"])
        if kind == "done":
            self._run.finish()


def _scalars(kind: str, values: Values) -> dict[str, float]:
    """`kind/name` -> number, and `kind/group/name` where there are groups."""
    numbers = {f"{kind}/{n}": float(v) for n, v in values.items() if isinstance(v, int | float) and n != "step"}
    for group, found in values.get("groups", {}).items():
        numbers |= {f"{kind}/{group}/{name}": float(value) for name, value in found.items()}
    return numbers
