"""What a person sees before and after training: tables and facts of a run. Reads runs and results, changes nothing."""

import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sft_jax.data.report import DataReport
from sft_jax.data.rows import plain
from sft_jax.estimate import Candidate, Estimate
from sft_jax.export import in_python
from sft_jax.jobs import Result
from sft_jax.report.compare import Comparison
from sft_jax.report.tables import figure
from sft_jax.run import Run, plan
from sft_jax.scores import Scores
from sft_jax.tasks.task import Audit
from sft_jax.train.report import Screen, shown, size
from sft_jax.train.state import abstract_frozen
from sft_jax.weights.files import count

EXAMPLE, EXAMPLES = 60, 50  # characters of a text that is shown to be typed, and rows that it is looked for in


def start() -> Screen:
    """The screen of this process; only the first of several processes shows anything."""
    return Screen(Console(highlight=False, soft_wrap=True, quiet=jax.process_index() > 0))


def show_run(console: Console, run: Run) -> None:
    """What was loaded, what there is to learn from, and how it will be trained."""
    show_facts(console, "Model", _model(run))
    show_rows(console, run.report)
    show_facts(console, "Data", _data(run))
    if run.audit:
        show_audit(console, run.audit)
    show_facts(console, "Training", _training(run))
    console.print()


def show_data(console: Console, report: DataReport) -> None:
    """What became of the rows, how they were read, and what is supervised of them."""
    show_rows(console, report)
    if report.notes:
        show_facts(console, "Supervised", report.notes)


def show_rows(console: Console, report: DataReport) -> None:
    """What became of the rows, and what there is to say of them."""
    show_table(console, "Rows", _rows(report))
    findings = _findings(report)
    if len(findings) > 1:
        show_table(console, "Found in the rows", findings)
    for warning in report.warnings:
        console.print(Text(f"  ! {warning}", "yellow"), soft_wrap=True)


def show_audit(console: Console, audit: Audit) -> None:
    """What is supervised: the parts of a few documents in green, or in brackets where there are no colours."""
    show_facts(console, "Supervised", audit.facts)
    for row in audit.rows:
        line = Text("  ")
        for piece, learned in row:
            line.append_text(_piece(console, piece, learned=learned))
        console.print(line)


def show_records(console: Console, records: Iterable[Mapping[str, Any]]) -> None:
    """What is learned of documents, a heading and a line of each; weights other than 1 stand behind what has them."""
    for record in records:
        console.print(f"\n[bold]{escape(record['place'])}[/bold]")
        line = Text("  ")
        for text, weight, label in record["pieces"]:
            said = "".join([f" {label}" if label else "", f" ×{weight:g}" if weight not in (0, 1) else ""])
            line.append_text(_piece(console, text, learned=weight > 0)).append(said, "bold")
        console.print(line)


def _piece(console: Console, text: str, *, learned: bool) -> Text:
    """A piece in green where it is learned, or in brackets where there are no colours."""
    plain = "".join(c if c.isprintable() else "⏎" if c == "\n" else repr(c)[1:-1] for c in text)
    return Text(plain if console.is_terminal or not learned else f"⟦{plain}⟧", "green" if learned else "dim")


def show_result(console: Console, run: Run, result: Result) -> None:
    """Scores beside what they are to be compared with, and what to type next."""
    if result.test:
        show_tables(console, result.test)
        headline = run.task.headline
        rows = [
            ["on the test split", headline],
            *result.baselines.items(),
            ["this run", result.test.metrics[headline]],
        ]
        show_table(console, "scores", [[a, b if isinstance(b, str) else f"{b:.4f}"] for a, b in rows])
    seconds, summary = result.summary["seconds"], result.summary
    best = f", best at step {result.best_step}" if result.best_step else ""
    unit = "images" if run.task.images else "real tokens"
    kept, waiting = summary["programs"]["found"], seconds["waiting"] / (seconds["train"] or 1)
    facts = {
        "steps": f"{result.steps}{best}",
        "speed": f"{summary['tokens_per_second']:,.0f} {unit}/s",
        "seconds": f"{seconds['total']:.0f} in all, {seconds['train']:.0f} training, "
        f"{seconds['compile']:.0f} compiling ({kept} programs were kept), first step after "
        f"{seconds['to_first_step']:.1f}; {waiting:.0%} of training was waiting for data",
        "peak memory": f"{summary['peak_memory_bytes'] / 1e9:.2f} GB",
    }
    show_facts(console, "Done", facts)
    model = shlex.quote(str(result.directory / "model"))
    file = "pictures/" if run.task.images else "rows.jsonl" if _is_chat(run) else "rows.csv"
    show_facts(
        console,
        "Next",
        {
            "see the report": f"open {result.directory / 'report.html'} in a browser",
            "try it": to_try(run, str(result.directory / "model")),
            "score again": f"sft-jax evaluate {shlex.quote(str(result.directory))}",
            "on a file": f"sft-jax predict {model} {file} -o predicted.csv",
            "on new labels": f"sft-jax evaluate {model} --data {file}",
            "in Python": in_python(run.task, str(result.directory / "model")),
        },
    )


def show_estimate(console: Console, run: Run, found: Estimate, limit: int) -> None:
    """What a step needs of each device, by what it is for."""
    devices, (rows, tokens) = run.mesh.devices.size, found.shape
    what = f"{rows} x {tokens} tokens" if not run.task.images else f"{rows} images"
    facts = {
        "parameters": f"{size(found.parameters)} trained, {size(found.frozen)} frozen",
        "optimizer": size(found.optimizer),
        "batch": f"{size(found.batch)}; the largest is {what}, {len(run.batches.shapes)} shapes are declared",
        "temporary": size(found.temporary),
        "in all": f"{size(found.total)} of {size(limit)}: {'fits' if found.total <= limit else 'does not fit'}",
        "compiling": f"{found.seconds:.1f} s a shape",
    }
    if run.recomputed is None:
        facts["features"] = "are computed once, so that a step needs less than this"
    title = "A step" if devices == 1 else f"A step, on each of {devices} devices"
    show_facts(console, title, facts)


def show_smaller(console: Console, candidates: Iterable[Candidate], limit: int) -> None:
    """What would need less, what saves most last; and what of it fits."""
    rows = [["setting", "in all", ""]]
    for found in sorted(candidates, key=lambda found: -found.total):
        fits = "fits" if found.total <= limit else "does not fit"
        rows.append([" ".join(found.settings), size(found.total), fits])
    show_table(console, "what would help" if len(rows) > 1 else "nothing that was tried needs less", rows)


def to_try(run: Run, model: str) -> str:
    """A command that asks the exported model of a run for something, of the run's own rows where that can be typed."""
    task, command = run.task, f"sft-jax predict {shlex.quote(model)}"
    if _is_chat(run):
        return f"sft-jax chat {shlex.quote(model)}"
    if task.images:
        return f"{command} picture.jpg"
    if len(task.texts) > 1:  # a line says not which column it is of
        return f"{command} rows.jsonl"
    prepared = run.rows.get("test", run.rows["train"])
    shown = (" ".join(plain(text).split()) for text in prepared.texts[0][:EXAMPLES])
    fitting = (textwrap.shorten(text, EXAMPLE, placeholder="") for text in shown if text.isprintable())
    text = next((text for text in fitting if text and not text.startswith(("-", "{"))), "some text")
    return f"echo {shlex.quote(text)} | {command}"


def _is_chat(run: Run) -> bool:
    written = run.task.to_hf().get("sft_jax_task", {})  # with a format that the columns told
    return written.get("format") == "chat"


def show_evaluation(console: Console, title: str, scores: Scores) -> None:
    """Every metric of labelled rows, those of their groups, and the task's own tables."""
    rows = [["metric", "value"], *([name, f"{value:.4f}"] for name, value in scores.metrics.items())]
    show_table(console, title, rows)
    show_tables(console, scores)


def show_tables(console: Console, scores: Scores) -> None:
    """The task's own tables of a split, and the metrics of its groups."""
    for title, table in scores.tables.items():
        show_wide(console, title, table)
    if scores.groups:
        names = shown(scores.metrics)
        rows = [[group, *(f"{found[name]:.4f}" for name in names)] for group, found in scores.groups.items()]
        show_wide(console, "by group", [["group", *names], *rows])


def show_wide(console: Console, title: str, rows: Sequence[Sequence[Any]]) -> None:
    """A table that no heading is cut of: names that stand on both sides are numbered, columns go on below."""
    table = [[str(cell) for cell in row] for row in rows]
    if _width(table) > console.width and table[0][1:] == [row[0] for row in table[1:]]:
        numbers = range(1, len(table))
        named = [[f"{number} {row[0]}", *row[1:]] for number, row in zip(numbers, table[1:], strict=True)]
        table = [[table[0][0], *map(str, numbers)], *named]
    columns = [list(column) for column in zip(*table, strict=True)]
    parts: list[list[list[str]]] = []
    for column in columns[1:]:
        wider = [*zip(*columns[:1], *(parts[-1] if parts else []), column, strict=True)]
        if parts and _width(wider) <= console.width:
            parts[-1].append(column)
        else:
            parts.append([column])
    begin = 1
    for part in parts or [[]]:
        end = begin + len(part) - 1
        at = f"{title}, columns {begin} to {end} of {len(columns) - 1}" if len(parts) > 1 else title
        show_table(console, at, [list(row) for row in zip(columns[0], *part, strict=True)])
        begin = end + 1


def show_comparison(console: Console, found: Comparison) -> None:
    """The table of runs, and those of what differs between them; on its side where it would be too wide."""
    for sheet in (found.scores, found.settings, found.manifests):
        if not sheet.rows:
            continue
        upright = [sheet.heading, *([figure(cell) for cell in row] for row in sheet.rows)]
        aside = [list(column) for column in zip(*upright, strict=True)]
        fits = _width(upright) <= max(console.width, _width(aside))
        show_table(console, sheet.title, upright if fits else aside)


def show_table(console: Console, title: str, rows: Sequence[Sequence[Any]]) -> None:
    """A table whose first row is the heading; what looks like markup in names of labels is none."""
    heading, *rest = ([escape(str(cell)) for cell in row] for row in rows)
    table = Table(*heading, title=escape(title), title_justify="left")
    for number, column in enumerate(table.columns):
        column.justify = "right" if number else "left"
        column.overflow = "fold"  # a name is never cut
    for row in rest:
        table.add_row(*row)
    console.print(table)


def show_facts(console: Console, title: str, facts: Mapping[str, str]) -> None:
    """A heading and aligned `name  value` lines."""
    console.print(f"\n[bold]{title}[/bold]")
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        console.print(f"  {name.ljust(width)}  {value}", markup=False)


def _width(rows: Sequence[Sequence[str]]) -> int:
    """Characters that a table of these rows takes across."""
    return 1 + sum(3 + max(map(len, column)) for column in zip(*rows, strict=True))


def _model(run: Run) -> dict[str, str]:
    shapes, matched = run.model.template.shapes, run.matched
    config = run.checkpoint.config
    facts = {
        "checkpoint": f"{run.config.model.source} ({config['model_type']}, {len(matched.loaded)} tensors loaded)",
        "initialised": (", ".join(matched.initialised) or "nothing") if matched.loaded else "all of it",
        "ignored": ", ".join(matched.ignored) or "nothing",
    }
    facts |= {"remarks": "; ".join(run.checkpoint.remarks)} if run.checkpoint.remarks else {}
    facts |= {"config.json": f"{', '.join(run.model.unread)} not read"} if run.model.unread else {}
    frozen = count({p: shapes[p] for p in run.frozen})
    total = count(shapes)
    facts["parameters"] = f"{total - frozen:,} trainable, {frozen:,} frozen"
    steps = run.batches.steps
    for step, what in plan(run).begins:
        facts[f"frozen until step {step}"] = f"of {steps}, trained from then on: {what}"
    if run.model.adapters:
        facts["adapters"] = f"{len(run.model.adapters)}, on {', '.join([*run.model.adapters][:3])} ..."
    beside = abstract_frozen(run.model.template, run.frozen, run.dtype, run.few)
    state = 12 * (total - frozen) + sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(beside))
    facts["memory"] = f"about {state / 1e6:,.0f} MB for parameters and moments, before activations"
    return facts


def _rows(report: DataReport) -> list[list[Any]]:
    """A column a split, so that any number of labels has room."""
    splits = report.splits
    labels = splits["train"].labels
    counted = splits["train"].tokens
    of_tokens = ["median length, tokens", "95 %", "longest", "truncated", "padding"]
    # Images are documents of one token, of which there is nothing to say.
    columns: list[list[Any]] = [["", "read", "used", *labels]]
    columns[0] += of_tokens if counted and counted.lengths["max"] > 1 else []
    for split, found in splits.items():
        column: list[Any] = [split, found.read, found.used, *(found.labels.get(label, 0) for label in labels)]
        if found.tokens:
            lengths = [round(found.tokens.lengths[name]) for name in ("50 %", "95 %", "max")]
            column += [*lengths, f"{found.tokens.truncated_share:.1%}", f"{found.tokens.padding_share:.1%}"]
        columns.append(column[: len(columns[0])])
    return [list(row) for row in zip(*columns, strict=True)]


def _findings(report: DataReport) -> list[list[Any]]:
    """What was found and what became of it, with the first example of each."""
    table: list[list[Any]] = [["split", "what", "rows", "became", "such as"]]
    for split, found in report.splits.items():
        counted = {"duplicate": found.duplicates, "conflict": found.conflicts, "leaked": found.leaked}
        kept = {kind: count for kind, count in counted.items() if count and kind not in found.dropped}
        cut = {"for other splits": found.cut} if found.cut else {}
        lost = found.tokens.lost if found.tokens else {}
        for became, kinds in (("dropped", found.dropped), ("kept", kept), ("cut", cut), ("lost", lost)):
            for kind, rows in kinds.items():
                table.append([split, kind, rows, became, *found.examples.get(kind, [""])[:1]])
    return table


def _data(run: Run) -> dict[str, str]:
    unused = sorted(set(run.rows["train"].rows.names) - set(run.task.columns))
    layout, shapes = run.config.data.layout.kind, run.batches.shapes
    tokens = run.report.splits["train"].tokens
    padding = tokens.padding_share if tokens else 0.0
    told = {"format": run.task.told} if run.task.told else {}
    facts = {**told, "columns": f"{', '.join(run.task.columns)} read; {', '.join(unused) or 'none'} not used"}
    if run.task.images:
        return facts
    return facts | {
        "layout": f"{layout}; {len(shapes)} declared shapes: {', '.join(str(s) for s in shapes)}",
        "padding": f"{padding:.1%} of training tokens",
    }


def _training(run: Run) -> dict[str, str]:
    config, order = run.config, run.batches.order
    optim, schedule = config.optim, config.optim.schedule
    axes = " × ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items())
    device = jax.devices()[0]
    return {
        "steps": f"{run.batches.steps:,} of {'about ' if run.batches.packs else ''}{config.train.batch_size} documents "
        f"({order.steps_per_epoch:,} an epoch, {config.train.accumulate} microbatches)",
        "optimizer": f"{optim.name}, rate {optim.lr:g} {schedule.kind}, warmup {schedule.warmup:g}, "
        f"decay {optim.weight_decay:g}, clip {optim.clip}",
        "arithmetic": config.train.compute_dtype,
        "mesh": f"{axes} of {jax.device_count()} {device.platform} device(s), {device.device_kind}",
        "seeds": ", ".join(f"{name} {value}" for name, value in config.seed.model_dump().items()),
        "directory": str(run.directory),
    }
