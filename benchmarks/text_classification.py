"""Ours against the peer on one text classification, the same rows and recipe on both sides.

Owns the order of the runs, the figures that are compared and the report. Every run is a fresh
process, one at a time; ours goes through the command line as a user's would, the peer through
`peer.py`. The recipe is read back from what our run resolved, so no number is written down twice.
Reports medians, spreads and ratios; asserts nothing about time.
"""

import argparse
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
# The peer trains on every row it is given and looks at the test rows once, so ours does as well.
EQUAL_WORK = (
    "train.steps=null",
    "data.split.validation=0",
    "eval.every=never",
    "eval.baselines=false",
)
# What our task is called by peer.py.
KINDS = {"sequence_classification": "one", "multi_label_classification": "several", "regression": "number"}
AGAIN = "again"  # a run with the programs of one before it
LOG_LINES = 30
# A pipe counts as narrow, and the cells of five variants would be broken up in it.
LEAST_WIDTH = 120

Tree = dict[str, Any]
Runs = list[Tree]


class Figure(NamedTuple):
    """How one figure is shown."""

    key: str
    heading: str
    unit: float = 1
    digits: int = 1
    ratio: bool = False


FIGURES = (
    Figure("tokens_per_second", "real tokens/s", digits=0, ratio=True),
    Figure("wall_seconds", "wall, s", ratio=True),
    Figure("to_first_step_seconds", "to first step, s"),
    Figure("compile_seconds", "compilation, s"),
    Figure("train_seconds", "training, s"),
    Figure("process_bytes", "peak process, MiB", unit=2**20, digits=0, ratio=True),
    Figure("device_bytes", "peak device, MiB", unit=2**20, digits=0, ratio=True),
    Figure("padding_share", "padding, %", unit=0.01),
    Figure("accuracy", "accuracy, %", unit=0.01, digits=2, ratio=True),
    Figure("f1_macro", "macro F1, %", unit=0.01, digits=2),
    Figure("loss", "test loss", digits=4),
    Figure("steps", "steps", digits=0),
)


def main() -> None:
    """Run every side in turn, keep what came out, show it."""
    options = parse_options()
    report = {
        "benchmark": Path(__file__).stem,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "revision": revision(),
        "machine": machine(),
        "versions": versions(),
        "options": vars(options),
        "runs": [],
    }
    console = Console(width=max(Console().width, LEAST_WIDTH))
    with tempfile.TemporaryDirectory(prefix="benchmark-") as directory:
        measure(options, report, Path(directory), console)
    report["medians"] = medians(report["runs"])
    report["ratios"] = ratios(report["runs"])
    save(options.out, report)
    console.print(figures_table(report["runs"]))
    if report["ratios"]:
        console.print(ratios_table(report["ratios"]))
    console.print(f"every run: {options.out}")


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--ours",
        type=names,
        default="float32,bfloat16",
        help="types that ours computes in; add +planned, +bucketed or +padded to a type for another layout, +again for "
        "a run that finds the programs that one before it has kept",
    )
    parser.add_argument(
        "--peers",
        type=names,
        default="default,tuned,tuned_bf16",
        help="modes of peer.py; add +compile to a mode for torch.compile",
    )
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter with torch")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--max-rows", type=int, default=0, help="first rows of a split; 0 = all")
    parser.add_argument("--out", type=Path, help="report; left out: a new file in results/")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="for our config")
    options = parser.parse_args()
    if not options.ours or options.repeats < 1:
        parser.error("--ours and --repeats: the recipe comes from our run, so there must be one")
    options.out = options.out or new_result(Path(__file__).stem)
    return options


def names(text: str) -> list[str]:
    """The names in a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def new_result(name: str) -> Path:
    """A file name that sorts by time."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    return HERE / "results" / f"{name}-{stamp}.json"


def measure(options: argparse.Namespace, report: Tree, directory: Path, console: Console) -> None:
    """Fill `report["runs"]`, the sides interleaved so that a slow spell of the machine hits all."""
    ours = {f"ours_{dtype}": dtype for dtype in options.ours}
    recipe: Tree = {}
    # Ours come first: the peers take their recipe from the first of them.
    for seed, variant in itertools.product(range(options.repeats), [*ours, *options.peers]):
        console.print(f"repeat {seed + 1} of {options.repeats}: {variant}")
        load, place = os.getloadavg()[0], directory / f"{seed}-{variant}"
        if variant in ours:
            figures = run_ours(options, ours[variant], seed, place)
            recipe = recipe or read_recipe(place)
        else:
            figures = run_peer(options.peer_python, recipe, variant, seed, place)
        report["runs"].append({"variant": variant, "seed": seed, "load_before": load, **figures})
        save(options.out, report)


def run_ours(options: argparse.Namespace, variant: str, seed: int, directory: Path) -> Tree:
    """One training run of ours and its figures."""
    dtype, _, extra = variant.partition("+")
    layout = extra if extra != AGAIN else ""
    settings = [
        f"run.dir={directory}",
        "run.resume=never",
        f"train.compute_dtype={dtype}",
        *([f"data.layout.kind={layout}"] if layout else []),
        f"train.epochs={options.epochs:g}",
        f"seed={seed}",
        *EQUAL_WORK,
        *([f"data.max_rows={options.max_rows}"] if options.max_rows else []),
        *options.set,
    ]
    programs = directory.parent / f"programs-{variant}" if extra == AGAIN else None
    command = [*our_command(), "train", options.config, *settings]
    if programs and not programs.exists():
        programs.mkdir(mode=0o700)
        run_child([*command, f"run.dir={directory}-before"], directory, programs)
    outside = run_child(command, directory, programs)
    summary = json.loads((directory / "summary.json").read_text())
    seconds = summary["seconds"]
    return {
        **outside,
        **summary["test"],
        "tokens_per_second": summary["tokens_per_second"],
        "to_first_step_seconds": seconds["to_first_step"],
        "compile_seconds": seconds["compile"],
        "train_seconds": seconds["train"],
        "padding_share": summary["padding_share"],
        "steps": summary["steps"],
        # Without a GPU the summary repeats the size of the process, which is measured from outside.
        "device_bytes": summary["peak_memory_bytes"] if gpu() else 0,
        "reported": summary,
    }


def our_command() -> list[str]:
    """The installed command beside this interpreter, else the package as a module."""
    command = Path(sys.executable).with_name("sft-jax")
    return [str(command)] if command.exists() else [sys.executable, "-m", "sft_jax"]


def run_peer(python: str, recipe: Tree, peer: str, seed: int, directory: Path) -> Tree:
    """One run of the peer on our recipe and its figures."""
    mode, _, extra = peer.partition("+")
    arguments = {**recipe, "mode": mode, "seed": seed, "out": f"{directory}.json"}
    command = [python, str(HERE / "peer.py"), *([f"--{extra}"] if extra else [])]
    for name, value in arguments.items():
        values = value if isinstance(value, list) else [value]
        command += [f"--{name}", *map(str, values)]
    outside = run_child(command, directory)
    reported = json.loads(Path(arguments["out"]).read_text())
    same = (
        "tokens_per_second",
        "to_first_step_seconds",
        "compile_seconds",
        "train_seconds",
        "padding_share",
        "steps",
    )
    return {
        **outside,
        **reported["test"],
        **{key: reported[key] for key in same},
        "device_bytes": reported["peak_device_bytes"],
        "reported": reported,
    }


def run_child(command: list[str], directory: Path, programs: Path | None = None) -> Tree:
    """Run to the end; seconds and peak resident size, taken the same way for every side.

    Seconds of the processors count work alone: they are those to trust where the machine had other work as well. Each
    run compiles for itself, unless it is told where programs are kept.
    """
    kept = {"JAX_COMPILATION_CACHE_DIR": str(programs)} if programs else {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    log = Path(f"{directory}.log")
    with log.open("wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **kept})
        try:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
        seconds = time.perf_counter() - started
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
        raise SystemExit(f"{tail}\n\nexit code {process.returncode}: {' '.join(command)}")
    return {
        "wall_seconds": seconds,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "process_bytes": usage.ru_maxrss * 1024,
        "command": command,
    }


def read_recipe(directory: Path) -> Tree:
    """Arguments of `peer.py`, from the configuration and the length of our run."""
    config = yaml.safe_load((directory / "config.yaml").read_text())
    steps = json.loads((directory / "summary.json").read_text())["steps"]
    source, task = config["data"]["source"], config["task"]
    if not source.get("test"):
        raise SystemExit(f"{directory}: the peer needs data.source.test")
    train, optim = config["train"], config["optim"]
    warmup = float(optim["schedule"]["warmup"])
    recipe = {
        "model": local(config["model"]["source"]),
        "train": local(source["train"]),
        "test": local(source["test"]),
        "text": task["text"],
        "label": task["label"],
        "kind": KINDS[task["kind"]],
        "batch-size": train["batch_size"],
        "epochs": float(train["epochs"]),
        "lr": float(optim["lr"]),
        "weight-decay": float(optim["weight_decay"]),
        "clip": float(optim["clip"] or 0),
        "warmup-share": warmup if warmup < 1 else warmup / steps,
        "max-length": config["data"]["max_length"],
        "max-rows": config["data"].get("max_rows") or 0,
    }
    optional = {
        "dropout": config["model"].get("dropout"),
        "text-pair": task.get("text_pair"),
        "separator": task.get("separator"),
    }
    return recipe | {name: value for name, value in optional.items() if value is not None}


def local(source: str | list[str]) -> str | list[str]:
    """A path or paths on this machine."""
    if isinstance(source, list):
        return [str(local(path)) for path in source]
    if not source.startswith("asset:"):
        return source
    from sft_jax import assets

    return str(assets.resolve(source))


def medians(runs: Runs) -> Tree:
    """For each variant and figure: median, least and most over the repeats."""
    return {
        variant: {figure.key: spread([run[figure.key] for run in of(runs, variant)]) for figure in FIGURES}
        for variant in variants(runs)
    }


def ratios(runs: Runs) -> Tree:
    """For each pair and figure: median, least and most of ours / peer.

    Each ratio is formed within one repeat, where both sides saw the same spell of the machine.
    """
    found: Tree = {}
    ours = [name for name in variants(runs) if name.startswith("ours_")]
    for left in ours:
        for right in (name for name in variants(runs) if name not in ours):
            pairs = list(zip(of(runs, left), of(runs, right), strict=True))
            found[f"{left} / {right}"] = {
                figure.key: spread([a[figure.key] / b[figure.key] for a, b in pairs])
                for figure in FIGURES
                if figure.ratio and all(b[figure.key] for _, b in pairs)
            }
    return found


def of(runs: Runs, variant: str) -> Runs:
    """The runs of one variant, by repeat."""
    return [run for run in runs if run["variant"] == variant]


def variants(runs: Runs) -> list[str]:
    """Each variant once, in the order of the runs."""
    return list(dict.fromkeys(run["variant"] for run in runs))


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def figures_table(runs: Runs) -> Table:
    """A column for each variant."""
    found = medians(runs)
    table = Table("", title="median, least – most", show_lines=True)
    for variant in found:
        table.add_column(variant, justify="right")
    for figure in FIGURES:
        # No device, or no compiler anywhere: a row of zeros says nothing.
        row = [figures[figure.key] for figures in found.values()]
        if any(values["max"] for values in row):
            cells = (cell(values, figure.unit, figure.digits) for values in row)
            table.add_row(figure.heading, *cells)
    return table


def ratios_table(found: Tree) -> Table:
    """A row for each pair of variants."""
    table = Table("ours / peer", title="median, least – most of the ratios", show_lines=True)
    shown = [f for f in FIGURES if any(f.key in figures for figures in found.values())]
    for figure in shown:
        table.add_column(figure.heading.partition(",")[0], justify="right")
    for pair, figures in found.items():
        table.add_row(pair, *(cell(figures.get(f.key), digits=2) for f in shown))
    return table


def cell(values: dict[str, float] | None, unit: float = 1, digits: int = 1) -> str:
    """Median over least – most."""
    if values is None:
        return "–"
    median, least, most = (f"{values[k] / unit:,.{digits}f}" for k in ("median", "min", "max"))
    return f"{median}\n{least} – {most}"


def save(path: Path, report: Tree) -> None:
    """Write the report; also between runs, so that a run that fails loses none before it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(without_folders(report), indent=2, default=str) + "\n")


def machine() -> Tree:
    """What the figures were taken on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "cpu": next(models, platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": gpu(),
        "system": platform.platform(),
    }


def gpu() -> str | None:
    """Name of the first GPU, if there is one."""
    listed = said("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return listed.partition("\n")[0] or None


def versions() -> dict[str, str]:
    """Our side's packages; each peer run brings its own."""
    found = {"python": platform.python_version()}
    for package in ("sft_jax", "jax", "jaxlib", "flax", "optax", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def revision() -> str | None:
    """The commit that is measured, marked where the files differ from it."""
    return said("git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12") or None


def without_folders(node: Any) -> Any:
    """The report with absolute paths cut to their names: where files lay on one machine is no one's business."""
    if isinstance(node, dict):
        return {key: without_folders(value) for key, value in node.items()}
    if isinstance(node, list):
        return [without_folders(value) for value in node]
    if isinstance(node, str | Path) and str(node).partition("=")[2].startswith("/"):
        return f"{str(node).partition('=')[0]}={Path(str(node).partition('=')[2]).name}"
    return Path(node).name if isinstance(node, str | Path) and str(node).startswith("/") else node


def said(*command: str) -> str:
    """What a program prints, or nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


if __name__ == "__main__":
    main()
