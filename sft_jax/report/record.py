"""What the files of a run directory say of the run, read in one place for the report and for comparing."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yaml import YAMLError

from sft_jax.config.read import parse_value
from sft_jax.errors import RunError, reason
from sft_jax.report.audit import FILE, read_lines
from sft_jax.train.directory import is_used
from sft_jax.train.report import read_metrics


@dataclass(frozen=True)
class Record:
    """A run as its directory tells it; what was not written yet is empty."""

    path: Path
    text: str  # of config.yaml
    config: dict[str, Any]
    manifest: dict[str, Any]  # what the run is made of; of the processes that worked on it, nothing
    events: list[dict[str, Any]]  # of metrics.jsonl
    summary: dict[str, Any]
    data: Any
    review: dict[str, Any]
    audit: list[dict[str, Any]]  # of audit.jsonl: what is supervised of the first rows
    samples: list[dict[str, Any]]  # of samples.jsonl

    @property
    def name(self) -> str:
        """What the run is called: its directory."""
        return self.path.resolve().name

    @property
    def steps(self) -> int:
        """The last step that is known of."""
        return self.summary.get("steps") or max((event["step"] for event in self.events), default=0)

    @property
    def metric(self) -> str:
        """The metric that picks the best step; the loss, while that is the task's to say and the run goes on."""
        return self.config["eval"]["best_metric"] or self.summary.get("headline", "loss")

    @property
    def best_step(self) -> int | None:
        """The best step; None before the end, and without validation."""
        return self.summary.get("best_step")

    def curve(self, kind: str, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one figure over the events of one kind."""
        found = [(event["step"], event[name]) for event in self.events if event["kind"] == kind and name in event]
        return [step for step, _ in found], [value for _, value in found]


def read_record(path: Path) -> Record:
    """The run of a directory, finished or not; raises RunError where there is none."""
    if not is_used(path):
        raise RunError(f"{path}: holds no run (no config.yaml); give the run.dir of a `sft-jax train`")
    try:
        text = (path / "config.yaml").read_text(encoding="utf-8")
        config = parse_value(text)
        if not isinstance(config["eval"]["best_metric"], str | None):
            raise TypeError
    except (YAMLError, ValueError, TypeError, KeyError, RecursionError):
        raise RunError(f"{path / 'config.yaml'}: is not what `sft-jax train` wrote; put it back") from None
    kept = {name: _json(path / f"{name}.json") for name in ("manifest", "summary", "data", "review")}
    kept["manifest"].pop("attempts", None)
    return Record(
        path,
        text,
        config,
        events=read_metrics(path / "metrics.jsonl"),
        audit=read_lines(path / FILE),
        samples=read_lines(path / "samples.jsonl"),
        **kept,
    )


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise RunError(f"{file}: is not JSON ({reason(error)}); train again, or take it away") from None
