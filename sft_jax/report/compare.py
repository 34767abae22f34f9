"""Several runs side by side: their scores, what differs in how they were made, and their curves in one picture."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sft_jax.errors import ConfigError, RunError, SftError, did_you_mean, listing
from sft_jax.report import charts
from sft_jax.report.charts import Curve
from sft_jax.report.page import Part, course, render
from sft_jax.report.record import Record, read_record
from sft_jax.report.tables import Sheet
from sft_jax.train.directory import differences, write_whole

TOLD = ("schema", "config")  # of a manifest: the settings are shown by name
SHOWN = 32  # characters of a setting that differs


class Comparison(NamedTuple):
    """Runs, and what is to be seen of them."""

    names: list[str]
    runs: list[Record]
    scores: Sheet
    settings: Sheet  # where configurations differ
    manifests: Sheet  # where manifests do


def compare(paths: Sequence[Path], metrics: Sequence[str] = ()) -> Comparison:
    """The runs of these directories; `metrics` are shown, else those that picked the best steps and the headlines."""
    if len({path.resolve() for path in paths}) < max(2, len(paths)):
        raise ConfigError("compare: nothing to compare; give two run directories or more, each once")
    runs = _read(paths)
    names = [run.name for run in runs]
    names = names if len(set(names)) == len(names) else [str(path) for path in paths]
    settings = [{**run.config, "run": None} for run in runs]  # where a run lives is its name here
    return Comparison(
        names,
        runs,
        _scores(names, runs, _metrics(runs, metrics)),
        _differing("Settings that differ", names, settings),
        _differing("What else differs", names, [_without(run.manifest, TOLD) for run in runs]),
    )


def write_comparison(found: Comparison, file: Path) -> None:
    """Write a page like a report's: the tables, and the curves of all runs in one picture each."""
    metrics = list(dict.fromkeys(run.metric for run in found.runs))
    wanted = [("Train loss", "train", "loss"), ("Validation loss", "validation", "loss")]
    wanted += [(f"Validation {name}", "validation", name) for name in metrics if name != "loss"]
    drawn = []
    for title, kind, name in wanted:
        lines = [Curve(run, *record.curve(kind, name)) for run, record in zip(found.names, found.runs, strict=True)]
        drawn.append(charts.curves(title, course(lines), lines))
    differing = [sheet for sheet in (found.settings, found.manifests) if sheet.rows]
    parts = [
        Part("Scores", sheets=[found.scores._replace(title="")]),
        Part("Curves", "", charts=[chart for chart in drawn if chart]),
        Part("Differences", "" if differing else "None.", sheets=differing),
    ]
    try:
        write_whole(file, render(f"{len(found.runs)} runs", [str(run.path) for run in found.runs], parts))
    except OSError as error:
        raise RunError(f"{file}: cannot be written ({error.strerror}); give another --html") from None


def _read(paths: Sequence[Path]) -> list[Record]:
    """All of the runs, or all that keeps them from being read."""
    runs, problems = [], []
    for path in paths:
        try:
            runs.append(read_record(path))
        except SftError as error:
            problems.append(str(error))
    if problems:
        raise RunError(listing("compare", problems))
    return runs


def _metrics(runs: Sequence[Record], asked: Sequence[str]) -> list[str]:
    """The metrics to show; one that no run has is an error."""
    parts = [
        *(e for r in runs for e in r.events if e["kind"] == "validation"),
        *(r.summary.get("test", {}) for r in runs),
    ]
    known = sorted({name for part in parts for name, value in part.items() if isinstance(value, float)})
    unknown = [f"no run has a metric '{name}'{did_you_mean(name, known)}" for name in asked if name not in known]
    if unknown:
        raise ConfigError(listing(f"--metric (known: {', '.join(known) or 'none yet'})", unknown))
    usual = [name for run in runs for name in (run.metric, run.review.get("headline")) if name]
    return list(dict.fromkeys(asked or usual))


def _scores(names: Sequence[str], runs: Sequence[Record], metrics: Sequence[str]) -> Sheet:
    """A row for each run; of one that is not finished, what it came to so far."""
    baselines = list(dict.fromkeys(name for run in runs for name in run.summary.get("baselines", {})))
    heading = ["run", "steps", "best", *(f"{split} {m}" for m in metrics for split in ("validation", "test"))]
    rows: list[list[Any]] = []
    for name, run in zip(names, runs, strict=True):
        split = {"validation": _validation(run), "test": run.summary.get("test", {})}
        row = [name if run.summary else f"{name} (not finished)", run.steps, run.best_step]
        row += [split[s].get(m) for m in metrics for s in ("validation", "test")]
        row += [run.summary.get("baselines", {}).get(baseline) for baseline in baselines]
        spent = [run.summary.get("tokens_per_second"), run.summary.get("seconds", {}).get("total")]
        rows.append([*row, *(None if value is None else round(value) for value in spent)])
    units = dict.fromkeys(run.summary.get("unit", "tokens") for run in runs)
    table = [[*heading, *baselines, f"{' or '.join(units)}/s", "seconds"], *rows]
    filled = [c for c in range(len(table[0])) if c == 0 or any(row[c] is not None for row in rows)]
    heading, *rows = ([row[c] for c in filled] for row in table)
    return Sheet("Scores", heading, rows)


def _validation(run: Record) -> dict[str, Any]:
    """The scores of the best step; of a run that is not finished, the latest."""
    found = [event for event in run.events if event["kind"] == "validation"]
    return run.summary.get("validation") or (found[-1] if found else {})


def _without(tree: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key not in keys}


def _differing(title: str, names: Sequence[str], trees: Sequence[Any]) -> Sheet:
    rows = [[key, *(_short(value) for value in values)] for key, values in differences(*trees).items()]
    return Sheet(title, ["", *names], rows)


def _short(value: Any) -> str | None:
    text = str(value)
    return None if value is None else text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
