"""What evaluation, seeking and saving cost, as the data grows.

Three questions: does the memory of an evaluation grow with its rows (beside the rows themselves), is seeking to the end
of an epoch as quick as to its beginning, and for how long does a checkpoint hold up training? Each measurement of
memory is a process of its own. Medians; asserts nothing about time.
"""

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from text_classification import machine, new_result, revision, save, versions

Tree = dict[str, Any]
DOCUMENTS = 1_000_000  # of the epoch that is sought in
SEEKS = 15
SAVES = 5


def main() -> None:
    """Measure everything, keep it and show it."""
    options = parse_options()
    if options.child:
        print(json.dumps(evaluation(options.rows, options.config)))
        return
    report = {"revision": revision(), "machine": machine(), "versions": versions()}
    report["evaluation"] = [in_child(options.config, rows) for rows in (options.rows, 10 * options.rows)]
    report["seek_seconds"] = {f"{share:.0%}": seek(share) for share in (0.0, 0.9)}
    report["checkpoint"] = checkpoint(options.config)
    save(options.out, report)
    show(report)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--rows", type=int, default=2000, help="rows to evaluate; then ten times as many")
    parser.add_argument("--out", type=Path, help="report; left out: a new file in results/")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out or new_result(Path(__file__).stem)
    return options


def in_child(config: str, rows: int) -> Tree:
    """An evaluation in a process of its own."""
    command = [sys.executable, __file__, "--child", "--config", config, "--rows", str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def evaluation(rows: int, config: str) -> Tree:
    """Seconds and memory of one evaluation of `rows` rows: those of the configuration's test file, over and over."""
    from sft_jax import jobs, run
    from sft_jax.run import eval_program, initial

    with tempfile.TemporaryDirectory() as directory:
        file = repeated(run_config(config, directory).data.source.test, rows, Path(directory))
        prepared = run.prepare(run_config(config, directory, f"data.source.test={file}"))
        state, frozen = initial(prepared)
        program = eval_program(prepared, state.weights, frozen)
        program.compile(prepared.evals["test"][0])
        before, begun = resident(), time.perf_counter()
        jobs.score(prepared, "test", program, state.weights, frozen)
        seconds = time.perf_counter() - begun
    return {
        "rows": rows,
        "seconds": seconds,
        "bytes_before": before,
        "bytes_added": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
    }


def run_config(config: str, directory: str, *overrides: str) -> Any:
    """The configuration with few training rows, in a directory that is thrown away."""
    from sft_jax.config.read import read_config

    few = ("data.split.validation=0", "eval.every=never", "data.cache=false")
    return read_config([config], [f"run.dir={directory}/run", *few, *overrides])


def repeated(source: str, rows: int, directory: Path) -> Path:
    """A CSV of `rows` rows, those of the source again and again."""
    from sft_jax import assets

    with open(assets.resolve(source), newline="", encoding="utf-8") as lines:
        heading, *found = csv.reader(lines)
    with open(directory / "test.csv", "w", newline="", encoding="utf-8") as sink:
        csv.writer(sink).writerows([heading, *(found[i % len(found)] for i in range(rows))])
    return directory / "test.csv"


def seek(share: float) -> float:
    """Median seconds from nothing to the first batch after this share of an epoch."""
    import numpy as np

    from sft_jax.config.data import Layout
    from sft_jax.data.batch import Encoded, declare
    from sft_jax.data.loader import TrainBatches, prefetch
    from sft_jax.data.order import Order, permutation

    draw = np.random.default_rng(0)
    lengths = draw.integers(5, 60, DOCUMENTS)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = {"input_ids": np.ones(offsets[-1], np.int32)}
    encoded = Encoded(tokens, offsets, {"label": np.zeros(DOCUMENTS, np.int32)})
    order = Order(DOCUMENTS, 32, 0)
    batches = TrainBatches(encoded, order, declare(Layout(), encoded, order, 1), order.steps_per_epoch)
    found = []
    for _ in range(SEEKS):
        permutation.cache_clear()  # a new process has none either
        begun = time.perf_counter()
        next(prefetch(batches, int(share * order.steps_per_epoch), 4))
        found.append(time.perf_counter() - begun)
    return statistics.median(found)


def checkpoint(config: str) -> Tree:
    """Seconds that a save holds up training, that it takes until it is on disk, and that a verified restore takes."""
    import jax

    from sft_jax import run
    from sft_jax.run import initial
    from sft_jax.train.checkpoint import Checkpoints, Progress

    blocking, whole, restoring = [], [], []
    with tempfile.TemporaryDirectory() as directory:
        prepared = run.prepare(run_config(config, directory, "data.max_rows=64"))
        state, _ = initial(prepared)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        checkpoints = Checkpoints(Path(directory) / "checkpoints", 1)
        for number in range(1, SAVES + 1):
            begun = time.perf_counter()
            checkpoints.save(state, Progress(step=number))
            blocking.append(time.perf_counter() - begun)
            checkpoints.wait()
            whole.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            run.restore(prepared, checkpoints, number)
            restoring.append(time.perf_counter() - begun)
        checkpoints.close()
    medians = zip(("blocking", "on_disk", "restore"), (blocking, whole, restoring), strict=True)
    return {"bytes": size, **{f"{name}_seconds": statistics.median(values) for name, values in medians}}


def resident() -> int:
    """Bytes that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def show(report: Tree) -> None:
    """The figures as tables."""
    console = Console()
    table = Table("rows evaluated", "seconds", "MiB before", "MiB added")
    for found in report["evaluation"]:
        sizes = (f"{found[name] / 2**20:,.0f}" for name in ("bytes_before", "bytes_added"))
        table.add_row(f"{found['rows']:,}", f"{found['seconds']:.1f}", *sizes)
    console.print(table)
    console.print(f"first batch of {DOCUMENTS:,} documents, seconds: {report['seek_seconds']}")
    console.print(f"checkpoint: {report['checkpoint']}")


if __name__ == "__main__":
    main()
