"""`report.html`: a run for people, one file that needs nothing else, made of what is in the run directory.

What is shown follows from what is there: a task that gives other tables, or no confidence, needs no change here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sft_jax.report import charts
from sft_jax.report.charts import Chart, Curve
from sft_jax.report.record import Record, read_record
from sft_jax.report.tables import Sheet, figure, is_number, of_task, sheets
from sft_jax.train.directory import write_whole

FILE = "report.html"


METRICS = {
    "token_accuracy": "share of learned tokens that the model thinks likeliest, given all before them",
    "answer_accuracy": "share of documents of which every learned token is the likeliest",
}


class Part(NamedTuple):
    """A section of a page; what is empty is left out."""

    title: str
    text: str = ""
    tiles: Sequence[tuple[str, str, str]] = ()  # what, how much, and a remark
    charts: Sequence[Chart] = ()
    sheets: Sequence[Sheet] = ()
    mistakes: Sequence[dict[str, Any]] = ()
    audit: Sequence[dict[str, Any]] = ()  # documents in pieces that are learned or not
    folded: Sequence[tuple[str, Sequence[Sheet], str]] = ()  # title, tables, and text as it is


def write_report(path: Path) -> Path:
    """Write `report.html` of a run directory, and compute nothing that is there; gives the file."""
    run = read_record(path)
    parts = [_overview(run), _learning(run), _scores(run), *_answers(run), _mistakes(run), _samples(run)]
    parts += [_data(run), _supervised(run), _run(run)]
    model, task = run.config.get("model", {}), run.config.get("task", {})
    facts = [str(fact) for fact in (model.get("source"), task.get("kind"), _status(run)) if fact]
    write_whole(path / FILE, render(run.name, facts, [part for part in parts if part]))
    return path / FILE


def render(title: str, facts: Sequence[str], parts: Sequence[Part]) -> str:
    """A page of these parts; whatever comes from data is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = figure
    environment.tests["number"] = is_number
    text = environment.get_template("page.html").render(title=title, facts=facts, parts=parts)
    return text.encode("utf-8", "replace").decode("utf-8")  # halves of a character pair can be in texts


def course(found: Sequence[Curve]) -> str:
    """Where curves begin and end, in words."""
    ends = [(c.name, figure(float(c.values[0])), figure(float(c.values[-1]))) for c in found if c.values]
    return "; ".join(f"{name} from {first} to {last}" for name, first, last in ends)


def _status(run: Record) -> str:
    return f"{run.steps:,} steps" if run.summary else f"not finished: {run.steps:,} steps so far"


def _overview(run: Record) -> Part:
    """The figures that are looked for first."""
    summary, headline = run.summary, run.review.get("headline")
    test, validation = summary.get("test", {}), summary.get("validation", {})
    tiles = []
    headline = headline or summary.get("headline")
    if not test and headline in validation and headline != run.metric:
        tiles.append((f"validation {headline}", figure(validation[headline]), "there is no test split"))
    if headline in test:
        tiles.append((f"test {headline}", figure(test[headline]), f"{run.review['rows']:,} rows"))
    if run.metric in validation:
        tiles.append((f"validation {run.metric}", figure(validation[run.metric]), f"best, at step {run.best_step:,}"))
    if summary:
        seconds = summary.get("seconds", {})
        tiles += [
            ("training", f"{seconds.get('train', 0):,.0f} s", f"{seconds.get('total', 0):,.0f} s in all"),
            ("speed", f"{summary.get('tokens_per_second', 0):,.0f}", f"{summary.get('unit', 'tokens')} a second"),
            ("peak memory", f"{summary.get('peak_memory_bytes', 0) / 1e9:.2f} GB", ""),
        ]
    compared = [[name, value] for name, value in summary.get("baselines", {}).items()]
    table: Sheet | None = None
    if compared and headline in test:
        rows = [*compared, ["this run", test[headline]]]
        table = of_task("Compared with baselines", [["", f"test {headline}"], *rows])
    return Part("Overview", "" if summary else _status(run), tiles, sheets=[table] if table else [])


def _learning(run: Record) -> Part | None:
    """Curves over the steps."""
    if not run.events:
        return None
    best = run.best_step
    at = f"; the dotted line is the best step, {best:,}" if best else ""
    loss = [Curve(f"{kind} loss", *run.curve(kind, "loss")) for kind in ("train", "validation")]
    metric = Curve(run.metric, *run.curve("validation", run.metric))
    rate = Curve("learning rate", *run.curve("train", "lr"))
    norm = Curve("gradient norm", *run.curve("train", "grad_norm"))
    found = [
        charts.curves("Loss", course(loss) + at, loss, best),
        charts.curves(f"Validation {run.metric}", course([metric]) + at, [metric], best),
        charts.curves("Learning rate", course([rate]), [rate]),
        charts.curves("Gradient norm", course([norm]), [norm]),
    ]
    return Part("Learning curves", charts=[chart for chart in found if chart])


def _scores(run: Record) -> Part | None:
    """Every metric of both splits, and those of groups."""
    found = {split: run.summary[split] for split in ("validation", "test") if run.summary.get(split)}
    if not found:
        return None
    names = sorted({name for values in found.values() for name in values} - {"groups"})
    told = "".join(f" {name}: {what}." for name, what in METRICS.items() if name in names)
    shown = [Sheet("", ["metric", *found], [[name, *(v.get(name) for v in found.values())] for name in names])]
    names = [name for name in names if not name.endswith(("_micro", "_weighted"))]
    for split, values in found.items():
        if groups := values.get("groups"):
            rows = [[group, *(metrics.get(name) for name in names)] for group, metrics in groups.items()]
            shown.append(Sheet(f"By group, {split} split", ["group", *names], rows))
    return Part("Scores", f"Of the best step.{told}", sheets=shown)


def _answers(run: Record) -> list[Part]:
    """How the test split was answered: the task's own tables, and charts by confidence, size and length."""
    review, parts = run.review, []
    for title, table in review.get("tables", []):
        sheet = of_task("", table)
        text = "Rows of the test split: truth down, prediction across, shaded by the share of the row."
        parts.append(Part(title[:1].upper() + title[1:], text if sheet.matrix else "", sheets=[sheet]))
    found = [_calibration(review), *_numbers(review), _length(review)]
    shown = [chart for chart in found if chart]
    return (
        [*parts, Part("Answers", f"On the {review['rows']:,} rows of the test split.", charts=shown)]
        if shown
        else parts
    )


def _calibration(review: Mapping[str, Any]) -> Chart | None:
    if not (found := review.get("calibration")):
        return None
    text = f"expected calibration error {figure(found['ece'])} over {len(found['bins'])} bins of confidence; on the "
    return charts.reliability("Calibration", text + "dashed line, confidence is the share right", found["bins"])


def _numbers(review: Mapping[str, Any]) -> list[Chart]:
    if not (found := review.get("numbers")):
        return []
    truth, predicted, errors = found["truth"], found["predicted"], found["histogram"]
    text = f"{len(truth):,} of {review['rows']:,} rows; on the dashed line, the prediction is right"
    spread = f"errors from {figure(errors['edges'][0])} to {figure(errors['edges'][-1])}"
    return [
        charts.scatter("Prediction against truth", text, truth, predicted),
        charts.histogram("Errors", spread, errors["edges"], errors["rows"]),
    ]


def _length(review: Mapping[str, Any]) -> Chart | None:
    found = review.get("length") or {}
    if len(found.get("parts", [])) < 2:
        return None
    first, last = found["parts"][0], found["parts"][-1]
    text = (
        f"{found['score']} {figure(first['score'])} for the shortest {first['rows']:,} rows, {figure(last['score'])} "
        f"for the longest {last['rows']:,}; bars are one standard error"
    )
    return charts.by_length("Score by length", text, found["parts"], found["score"])


def _mistakes(run: Record) -> Part | None:
    found = run.review.get("mistakes")
    if found is None:
        return None
    wrong, rows = run.review.get("wrong"), run.review["rows"]
    of = f"{rows:,} rows of the test split" if wrong is None else f"{wrong:,} wrong answers on {rows:,} rows"
    text = f"{len(found)} of the {of}, worst first." if found else "No answer on the test split is wrong."
    return Part("Worst mistakes", text, mistakes=found)


def _data(run: Record) -> Part | None:
    """Whatever the data report says."""
    return Part("Data", "What was read, dropped and cut.", sheets=sheets(run.data)) if run.data else None


def _supervised(run: Record) -> Part | None:
    """What is learned of the first rows."""
    text = "The first training rows as the model reads them: what is learned is marked. All: sft-jax data audit."
    return Part("Learned of the rows", text, audit=run.audit) if run.audit else None


def _samples(run: Record) -> Part | None:
    """What the model answered at the last validation, and at the first one beside it."""
    if not run.samples:
        return None
    first, last = (run.samples[place].get("step") for place in (0, -1))
    asked: dict[str, dict[Any, str]] = {}
    for sample in run.samples:
        asked.setdefault(str(sample.get("prompt")), {})[sample.get("step")] = str(sample.get("answer"))
    steps = list(dict.fromkeys((first, last)))
    rows = [[prompt, *(said.get(step) for step in steps)] for prompt, said in asked.items()]
    text = "What the model answered to the first validation rows while it was trained."
    return Part("Samples", text, sheets=[Sheet("", ["asked", *(f"at step {step}" for step in steps)], rows)])


def _run(run: Record) -> Part:
    """What makes the run what it is, folded."""
    folded = [("Configuration", (), run.text), ("Manifest", sheets(run.manifest), "")]
    return Part("Run", "Settings, versions and digests.", folded=folded)
