"""The commands: each parses its arguments, calls what does the work, and prints. Heavy imports wait until needed."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from sft_jax import machine
from sft_jax.config.read import read_config, write_config
from sft_jax.config.schema import Config
from sft_jax.errors import ConfigError, DataError, Interrupted, did_you_mean

app = typer.Typer(
    help="Fine-tune pretrained Hugging Face checkpoints with labelled data, in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Look at configurations; starts nothing.", no_args_is_help=True)
app.add_typer(config_app, name="config")
data_app = typer.Typer(help="Look at the rows of a configuration; trains nothing.", no_args_is_help=True)
app.add_typer(data_app, name="data")

Words = Annotated[
    list[str],
    typer.Argument(metavar="CONFIG... [key=value ...]", help="YAML files, then overrides."),
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="The run.dir of a training run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value ...]", help="Settings that may differ, such as mesh.data=1."),
]
At = Annotated[str, typer.Option("--at", help="Which checkpoint: best or latest.")]
# What a command says of its own beginning, and must not say again to go on.
ONCE = ("run.resume=never", "run.resume=restart", "run.resume_step=")


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
    path: RunDir,
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="Which split: test or validation.")] = "test",
    at: At = "best",
) -> None:
    """Score the best step of a run on one of its splits."""
    from sft_jax import console, jobs, run

    prepared = run.open_run(path, overrides or [])
    scores, step = jobs.evaluate(prepared, split, at)
    console.show_evaluation(console.start().console, split, step, scores)


@app.command()
def predict(
    model: Annotated[str, typer.Argument(metavar="MODEL_DIR", help="A directory that export wrote.")],
    file: Annotated[
        str | None, typer.Argument(help="CSV, TSV, JSONL, Parquet or text file; stdin if left out.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Add the logits at full precision.")] = False,
    score: Annotated[
        bool, typer.Option("--score", help="Of a model that answers: how likely it finds the texts.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="How a model answers, such as num_beams=4; may be repeated."),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="An adapter of this model; of several, rows name theirs as `adapter`."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of tokens at a time.")] = 32,
) -> None:
    """Label texts and images, tag words, answer questions: a JSON line for each row."""
    from sft_jax.infer.adapted import load_adapted
    from sft_jax.infer.predict import load_predictor, read_inputs

    predictor = load_adapted(model, adapter, settings or []) if adapter else load_predictor(model, settings or [])
    lines = _stdin() if file is None else None
    rows = read_inputs(file or "", predictor.task, lines)
    for record in predictor(rows, batch_size, raw=raw, score=score):
        print(json.dumps(record, ensure_ascii=False))


@app.command()
def export(path: RunDir, out: Annotated[Path, typer.Argument(help="A new directory.")], at: At = "best") -> None:
    """Write the best step of a run as a Hugging Face directory."""
    from sft_jax import jobs, publish, run

    found = run.open_run(path)
    beside = f", its adapter in {publish.adapter_directory(out)}" if found.model.adapters else ""
    step = jobs.export(found, out, at)
    predict = f"sft-jax predict {out}"
    tried = f"{predict} picture.jpg" if found.task.images else f"echo 'some text' | {predict}"
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
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(found[name], out)
    print(f"{out} is yours; run it with: sft-jax train {out}")


def _read(words: list[str]) -> Config:
    files = [w for w in words if "=" not in w]
    if not files:
        raise ConfigError("command line: no configuration file; give one, such as configs/quickstart.yaml")
    return read_config(files, [w for w in words if "=" in w])


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


def _stdin() -> list[str]:
    try:
        return sys.stdin.read().split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"standard input: not UTF-8 at byte {error.start}; convert it, with iconv say") from None


def _recipes() -> dict[str, Path]:
    """The recipes: those of the checkout, or those that were installed with the package."""
    checkout = Path(__file__).parents[1] / "configs"
    home = checkout if checkout.is_dir() else Path(sys.prefix) / "share" / "sft_jax" / "configs"
    return {file.stem: file for file in sorted(home.glob("*.yaml"))}
