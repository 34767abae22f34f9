"""What training a decoder of 1B needs, as compiled: all of it, its upper half, adapters, adapters on a base in 4 bits.

Nothing is executed and no weights are made: `sft_jax.estimate` asks the compiler. A batch holds the documents of about
four rows of 512 tokens, packed, in bfloat16; its declared shape is in the report. Shows a table.
"""

import argparse
import itertools
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from speed_jobs import JOBS, make
from speed_ours import settings
from text_classification import LEAST_WIDTH, machine, names, new_result, revision, save

from sft_jax.config.read import read_config
from sft_jax.estimate import estimate, without_weights

# What is trained -> as `speed_jobs.Job.trained` has it, and settings besides.
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "all": ("all", []),
    "upper half": ("all", ["train.freeze=[embed/**, 'blocks/{0..7}/**']"]),
    "LoRA": ("adapter", []),
    "LoRA on nf4": ("adapter", ["adapter.base=nf4"]),
}
PARTS = ("parameters", "frozen", "optimizer", "temporary", "total")


def main() -> None:
    """Compile each, keep what came out after each, show it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", type=names, default=",".join(VARIANTS))
    parser.add_argument("--remat", type=names, default="none,dots,full")
    parser.add_argument("--dry-run", action="store_true", help="a model that compiles in seconds")
    parser.add_argument("--out", type=Path, help="report; left out: a new file in results/")
    options = parser.parse_args()
    out = options.out or new_result(Path(__file__).stem)
    job = replace(JOBS["llama-1b"], documents=64, longest=512, typical=200, batch=4, settings=())
    job = job.shrunk() if options.dry_run else job
    report: dict[str, Any] = {
        "benchmark": Path(__file__).stem,
        "revision": revision(),
        "machine": machine(),
        "found": [],
    }
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        directory = make(job, Path(scratch) / job.name)
        for variant, remat in itertools.product(options.variants, options.remat):
            trained, more = VARIANTS[variant]
            more = [*more, f"train.remat={remat}", "train.scan=always", "data.layout.kind=packed"]
            given = settings(replace(job, trained=trained), directory, "bfloat16", more)
            run = without_weights(read_config([], given))
            report["found"].append({"variant": variant, "remat": remat, **asdict(estimate(run))})
            save(out, report)
    console = Console(width=max(Console().width, LEAST_WIDTH))
    shown = Table("trained", "remat", *PARTS, title="GB on one device, as compiled")
    for one in report["found"]:
        shown.add_row(one["variant"], one["remat"], *(f"{one[part] / 1e9:.2f}" for part in PARTS))
    console.print(shown)
    console.print(f"every figure: {out}", highlight=False)


if __name__ == "__main__":
    main()
