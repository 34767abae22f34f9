"""The commands: each parses its arguments, calls what does the work, and prints. Heavy imports wait until needed."""

import importlib.metadata
import json
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from sft_jax import machine
from sft_jax.config.read import read_config, write_config
from sft_jax.config.schema import Config
from sft_jax.errors import ConfigError, DataError, Interrupted, did_you_mean, listing

if TYPE_CHECKING:
    from sft_jax.infer.records import Counted

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Look at configurations; starts nothing.", no_args_is_help=True)
app.add_typer(config_app, name="config")
data_app = typer.Typer(help="Look at the rows of a configuration; trains nothing.", no_args_is_help=True)
app.add_typer(data_app, name="data")
model_app = typer.Typer(help="Look at pretrained models; loads no weights.", no_args_is_help=True)
app.add_typer(model_app, name="model")

Words = Annotated[
    list[str],
    typer.Argument(metavar="CONFIG... [key=value ...]", help="YAML files, then overrides."),
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="The run.dir of a training run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value ...]", help="Settings that may differ, such as mesh.data=1."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="How a model answers, such as num_beams=4; may be repeated."),
]
Columns = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=COLUMN", help="A column of yours for one that is read, such as text=body."),
]
At = Annotated[str, typer.Option("--at", help="Which checkpoint: best or latest.")]
SHOWN_ROWS = 3  # of an audit on screen, unless others are asked for
# What a command says of its own beginning, and must not say again to go on.
ONCE = ("run.resume=never", "run.resume=restart", "run.resume_step=")


def _version(asked: bool) -> None:
    if asked:
        jax, python = importlib.metadata.version("jax"), platform.python_version()
        print(f"sft-jax {importlib.metadata.version('sft_jax')} (jax {jax}, Python {python})")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Fine-tune pretrained Hugging Face checkpoints with labelled data, in JAX."""


@app.command()
def train(
    words: Words,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what memory a step will need; reads no weights, writes nothing.")
    ] = False,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="With --dry-run: of a device, such as 16GB.")
    ] = None,
) -> None:
    """Train, or go on where the run directory stopped; then test and export the best step."""
    config = _read(words)
    if memory is not None and not dry_run:
        raise ConfigError("--memory: is for --dry-run; give both or none")
    machine.tune(deterministic=config.run.deterministic)  # before jax is there
    if dry_run:
        _plan(config, None if memory is None else _bytes(memory))
        return
    from sft_jax import console, jobs, run

    prepared = run.prepare(config)  # joins the other processes, so it comes before anything that asks for devices
    screen = console.start()
    console.show_run(screen.console, prepared)
    screen.steps, screen.unit = prepared.batches.steps, prepared.task.unit
    try:
        result = jobs.train(prepared, screen)
    except Interrupted as stop:
        command = shlex.join(["sft-jax", "train", *(word for word in words if not word.startswith(ONCE))])
        raise Interrupted(f"{stop}; to go on: {command}", stop.exit_code) from None
    finally:
        screen.stop()  # or the cursor of the terminal stays hidden
    console.show_result(screen.console, prepared, result)


@app.command()
def evaluate(
    path: Annotated[
        Path, typer.Argument(metavar="RUN", help="The run.dir of a training run; with --data also a model.")
    ],
    overrides: Overrides = None,
    split: Annotated[str | None, typer.Option(help="Which split of the run: test (the default) or validation.")] = None,
    at: Annotated[str | None, typer.Option("--at", help="Which checkpoint: best (the default) or latest.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Labelled rows in place of a split; may be repeated.")
    ] = None,
    columns: Columns = None,
    bad_rows: Annotated[
        str, typer.Option(metavar="error|drop", help="With --data: rows that cannot be scored stop, or are left out.")
    ] = "error",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write the scores as JSON as well.")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --data: write each row's, as .jsonl, .csv or .parquet.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over files that are there.")] = False,
) -> None:
    """Score the best step of a run on one of its splits, or a finished model on a file of labelled rows."""
    from sft_jax import console, jobs, run, scores
    from sft_jax.infer.output import check_output, new_file, record_file

    if out:
        check_output(out, replace=force, endings=(".json",))
    if data is None:
        given = {"--columns": columns, "--predictions": predictions, "--bad-rows": bad_rows != "error"}
        if wrong := [name for name, value in given.items() if value]:
            raise ConfigError(f"{', '.join(wrong)}: is for --data; give that as well, or leave it out")
        prepared = run.open_run(path, overrides or [])
        found, step = jobs.evaluate(prepared, split or "test", at or "best")
        title, plain = f"{split or 'test'} at step {step}", found.plain()
    else:
        given = {"--split": split, "--at": at, **dict.fromkeys(overrides or [], True)}
        if wrong := [name for name, value in given.items() if value]:
            raise ConfigError(f"{', '.join(wrong)}: is for a split of a run; leave it out, or --data")
        if bad_rows not in ("error", "drop"):
            raise ConfigError(f"--bad-rows: expected error or drop, got '{bad_rows}'")
        if predictions:
            check_output(predictions, replace=force)
        scored = scores.score_files(str(path), data, _renamed(columns), drop=bad_rows == "drop")
        found, title, plain = scored.scores, f"{', '.join(data)}, {len(scored.rows):,} rows", scored.plain()
        if scored.bad:
            first = scored.bad[0]
            print(f"{len(scored.bad):,} rows were left out, such as {first.place}: {first.text}", file=sys.stderr)
        if predictions:
            with record_file(predictions) as take:
                for record in scored.records():
                    take(record)
    console.show_evaluation(console.start().console, title, found)
    if out:
        with new_file(out) as fresh:
            fresh.write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@app.command()
def predict(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A directory that export wrote, a run, or a name of the hub.")
    ],
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE...]", help="CSV, TSV, JSONL, Parquet or text files, images, a folder; stdin if left out."
        ),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Add the logits at full precision.")] = False,
    score: Annotated[
        bool, typer.Option("--score", help="Of a model that answers: how likely it finds the texts.")
    ] = False,
    settings: Settings = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="An adapter of this model; of several, rows name theirs as `adapter`."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of tokens at a time.")] = 32,
    columns: Columns = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME,NAME", help="Columns of the input that records carry on; all for all of them."),
    ] = None,
    bad_rows: Annotated[
        str,
        typer.Option(
            metavar="keep|drop|error", help="A row that cannot be read: its error in place, nothing, or stop."
        ),
    ] = "keep",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write .jsonl, .csv or .parquet, whole or not.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Label texts and images, tag words, answer questions: a JSON record for each line or row, in their order."""
    from sft_jax.infer.adapted import load_adapted
    from sft_jax.infer.inputs import stream_inputs
    from sft_jax.infer.output import check_output, record_file
    from sft_jax.infer.predict import load_predictor
    from sft_jax.infer.records import ALL, Counted

    if out:
        check_output(out, replace=force)
    renamed, carried = _renamed(columns), [name for words in keep or [] for name in words.split(",")]
    how = (settings or [], renamed)
    predictor = load_adapted(model, adapter, *how) if adapter else load_predictor(model, *how)
    _in_utf8()
    person = not files and sys.stdin is not None and sys.stdin.isatty()
    if person:
        print("a text on each line, please; Ctrl-D ends", file=sys.stderr)
    windows, counted = stream_inputs(files or [], predictor.task, _stdin(), at_once=person), Counted()
    records = predictor.stream(
        list(windows) if bad_rows == "error" else windows,
        batch_size,
        raw=raw,
        score=score,
        bad_rows=bad_rows,  # pyright: ignore[reportArgumentType]
        keep=ALL if carried == [ALL] else carried,
        counted=counted,
    )
    with nullcontext(_print) if out is None else record_file(out) as take:
        for record in records:
            take(record)
    _say_counted(counted, predictor.longest, bad_rows, out)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A directory that export wrote, a run, or a hub name.")],
    adapter: Annotated[str | None, typer.Option(metavar="DIR", help="An adapter of this model.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is told before all else.")] = None,
    settings: Settings = None,
) -> None:
    """Talk with a model in the terminal, or a line a turn from a pipe; /reset forgets, /quit or Ctrl-D ends."""
    from sft_jax.data.records import text_records
    from sft_jax.infer.adapted import load_adapted
    from sft_jax.infer.chat import converse
    from sft_jax.infer.predict import load_predictor

    how: dict[str, Any] = {"settings": settings or [], "chats": True}
    loaded = load_adapted(model, [f"chat={adapter}"], **how) if adapter else load_predictor(model, **how)
    _in_utf8()
    if sys.stdin is not None and sys.stdin.isatty():
        print("/reset forgets what was said, /quit or Ctrl-D ends", file=sys.stderr)
        lines = _typed()
    else:
        found = text_records(_stdin(), "input")
        lines = (text if isinstance(text, str) else _refuse(line, text.text) for line, text in found)
    converse(loaded, lines, lambda text: print(text, flush=True), lambda text: print(text, file=sys.stderr), system)


@app.command()
def export(path: RunDir, out: Annotated[Path, typer.Argument(help="A new directory.")], at: At = "best") -> None:
    """Write the best step of a run as a Hugging Face directory."""
    from sft_jax import console, jobs, publish, run

    found = run.open_run(path)
    beside = f", its adapter in {publish.adapter_directory(out)}" if found.model.adapters else ""
    step = jobs.export(found, out, at)
    tried = console.to_try(found, str(out))
    print(f"step {step} of {path} is in {out}{beside}; try: {tried}")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A directory with pytorch_model.bin, or one file of torch.save.")],
    out: Annotated[Path, typer.Argument(help="A new directory.")],
) -> None:
    """Make safetensors of weights that torch pickled; runs nothing that they name, and needs no torch."""
    from sft_jax.convert import convert as rewrite

    for note in rewrite(source, out):
        print(note)
    print(f"{source} is in {out} as safetensors; use it with model.source={out}")


@app.command()
def goodput(path: RunDir) -> None:
    """Show where the time of a run went, over all its attempts, and how much of it went into steps that were kept."""
    from rich.console import Console

    from sft_jax import console
    from sft_jax.train import ledger

    found = ledger.read_account(path)  # asks for no device: the run may still be going on
    console.show_table(Console(highlight=False, soft_wrap=True), str(path), ledger.table(found))


@model_app.command("show")
def model_show(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="As model.source: a directory, a name, an asset.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
) -> None:
    """List the parameters of a model: the paths that patterns match, shapes, and names in the checkpoint."""
    from sft_jax.models.show import parameters

    rows = [("path", "shape", "in the checkpoint"), *parameters(source, revision)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:  # no table, which would be cut where a terminal is narrow
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@data_app.command("report")
def data_report(
    words: Words,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, as it stands in a run directory.")] = False,
) -> None:
    """What becomes of the rows: read, dropped and why, duplicates, conflicts, leaks, labels, lengths in tokens."""
    config = _read(words)
    from sft_jax import console, inputs

    report = inputs.report_data(config)
    if as_json:
        print(json.dumps(report.plain(), indent=2, ensure_ascii=False))
    else:
        console.show_data(console.start().console, report)


@data_app.command("audit")
def data_audit(
    words: Words,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="PATH", help="A .jsonl or .html file, or a directory for both."),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(metavar="FIRST:LAST", help="Rows by their numbers, such as 1:100 or 7; all if left out."),
    ] = None,
    split: Annotated[str, typer.Option(help="Which split: train, validation or test.")] = "train",
) -> None:
    """Which tokens of the rows are learned: each with its text and weight, and where its row stands."""
    config, which = _read(words), _rows(rows)
    if out is not None and out.suffix not in ("", ".jsonl", ".html"):
        raise ConfigError(f"--out {out}: expected a .jsonl or .html file, or a directory")
    from sft_jax import console, inputs
    from sft_jax.report import audit

    if out is None:
        found = inputs.audit_data(config, split, which or range(SHOWN_ROWS))
        console.show_records(console.start().console, found)
        return
    files = [out / audit.FILE, out / audit.PAGE] if not out.suffix or out.is_dir() else [out]
    for file in files:
        records = inputs.audit_data(config, split, which)
        title = f"What is learned of the {split} rows"
        count = audit.write_page(records, file, title) if file.suffix == ".html" else audit.write_lines(records, file)
        print(f"{file} has the tokens of {count:,} documents")


@app.command()
def report(path: RunDir) -> None:
    """Write the report of a run anew, also while it trains; computes nothing."""
    from sft_jax.report.page import write_report

    print(f"{write_report(path)} is written; open it in a browser")


@app.command()
def compare(
    paths: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Run directories.")],
    metric: Annotated[list[str] | None, typer.Option(help="A metric to show; may be given again.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with the curves overlaid.")] = None,
) -> None:
    """Put runs side by side: scores, and what differs in how they were made."""
    from sft_jax import console
    from sft_jax.report.compare import compare as compare_runs
    from sft_jax.report.compare import write_comparison

    found = compare_runs(paths, metric or [])
    console.show_comparison(console.start().console, found)
    if html is not None:
        write_comparison(found, html)
        print(f"{html} is written; open it in a browser")


@config_app.command("check")
def config_check(words: Words) -> None:
    """See whether a configuration is right; lists everything that is not."""
    _read(words)
    print("ok")


@config_app.command("show")
def config_show(words: Words) -> None:
    """Print the whole configuration, defaults included."""
    print(write_config(_read(words)), end="")


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of a configuration, for editors."""
    print(json.dumps(Config.model_json_schema(), indent=2))


@config_app.command("ls")
def config_ls() -> None:
    """List the recipes that come with sft_jax."""
    for file in _recipes().values():
        first = file.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        print(f"{file.stem:20} {first}")


@config_app.command("cp")
def config_cp(name: str, out: Path) -> None:
    """Copy a recipe to a file of your own."""
    found = _recipes()
    if name not in found:
        raise ConfigError(f"recipe '{name}': there is none{did_you_mean(name, found)} (known: {', '.join(found)})")
    if out.exists():
        raise ConfigError(f"{out}: is there already; give a new file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(found[name], out)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error.strerror}); give another file") from None
    print(f"{out} is yours; run it with: sft-jax train {out}")


def _rows(text: str | None) -> range | None:
    """The rows of `--rows`, from 0; None where all are meant."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text.strip())
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 0 < first <= last:
        raise ConfigError(f"--rows {text}: expected numbers from 1, such as 1:100 or 7")
    return range(first - 1, last)


def _read(words: list[str]) -> Config:
    files = [word for word in words if _is_file(word)]
    if not files:
        raise ConfigError("command line: no configuration file; give one, such as configs/quickstart.yaml")
    for file in map(Path, files):
        if file.is_dir():
            inside = file / "config.yaml"
            hint = f"give {inside}" if inside.is_file() else "give a YAML file"
            raise ConfigError(f"{file}: is a directory; {hint}")
        if file.suffix == ".json" and (beside := file.with_name("config.yaml")).is_file():
            raise ConfigError(f"{file}: is no configuration; give {beside}")
    return read_config(files, [word for word in words if not _is_file(word)])


def _is_file(word: str) -> bool:
    """Whether a word of a command line is a file: one that is there, or a path that begins with no section's name."""
    key, equals, _ = word.partition("=")
    if not equals or Path(word).is_file():
        return True
    return "/" in key and key.partition(".")[0] not in Config.model_fields


def _plan(config: Config, memory: int | None) -> None:
    """Say what a run would need, and where that is too much, what would help."""
    from sft_jax import console, estimate

    prepared = estimate.without_weights(config)
    screen = console.start().console
    found, limit = estimate.estimate(prepared), memory or estimate.memory()
    console.show_estimate(screen, prepared, found, limit)
    if found.total > limit:
        console.show_smaller(screen, estimate.smaller(prepared, found.total, limit), limit)


def _bytes(text: str) -> int:
    """The bytes of a size such as `16GB` or `500 MB`; a number without a unit could be of anything."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)\s*", text, re.IGNORECASE)
    if not found or float(found[1]) == 0:
        raise ConfigError(f"--memory: expected a size with its unit, such as 16GB, got '{text}'")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index((found[2] or " ").upper()))


def _typed() -> Iterator[str]:
    """What a person types, until Ctrl-D."""
    with suppress(ImportError):
        import readline  # noqa: F401  # lets lines be edited and found again
    with suppress(EOFError):
        while True:
            yield input("> ")
    print()


def _refuse(line: int, text: str) -> NoReturn:
    raise DataError(f"input: line {line}: {text}")


def _in_utf8() -> None:
    """What is printed is UTF-8, as JSON is, whatever the locale."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")


def _stdin() -> BufferedReader:
    """Standard input as bytes, whatever the locale would make of them."""
    from sft_jax.infer.inputs import opened

    buffer = getattr(sys.stdin, "buffer", None)
    if isinstance(buffer, BufferedReader):
        return buffer
    return opened("" if sys.stdin is None else sys.stdin.read())


def _print(record: Mapping[str, Any]) -> None:
    """Print a record at once."""
    print(json.dumps(record, ensure_ascii=False), flush=True)


def _say_counted(counted: "Counted", longest: int, bad_rows: str, out: Path | None) -> None:
    """Say on standard error what became of the records of an input; a DataError where none could be answered."""
    said = [*counted.notes]
    if out:
        said.append(f"{out} has {counted.records - (counted.bad if bad_rows == 'drop' else 0):,} records")
    if counted.truncated:
        said.append(f"{counted.truncated:,} of {counted.records:,} texts were cut to {longest:,} tokens: `truncated`")
    if counted.bad and counted.bad < counted.records:
        became = "were left out" if bad_rows == "drop" else "have an error in place of an answer"
        first = counted.first[0]
        said.append(f"{counted.bad:,} of {counted.records:,} {became}, such as {first.place}: {first.text}")
    for line in said:
        print(line, file=sys.stderr)
    if counted.bad and counted.bad == counted.records:
        shown = [f"{bad.place}: {bad.text}" for bad in counted.first]
        raise DataError(listing("input: nothing could be answered", shown, counted.bad - len(shown)))


def _renamed(words: list[str] | None) -> dict[str, str]:
    """`--columns text=body,id=number` as a dictionary: what is read -> the column that stands for it."""
    found: dict[str, str] = {}
    for word in ",".join(words or []).split(",") if words else []:
        name, equals, column = word.partition("=")
        if not (equals and name and column) or name in found:
            raise ConfigError(f"--columns {word}: expected NAME=COLUMN, such as text=body, each name once")
        found[name] = column
    return found


def _recipes() -> dict[str, Path]:
    """The recipes: those of the checkout, or those that were installed with the package."""
    checkout = Path(__file__).parents[1] / "configs"
    home = checkout if checkout.is_dir() else Path(sys.prefix) / "share" / "sft_jax" / "configs"
    return {file.stem: file for file in sorted(home.glob("*.yaml"))}
