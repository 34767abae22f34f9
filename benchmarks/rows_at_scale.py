"""What many rows cost until the first batch: seconds by stage and memory, cold and warm, beside `datasets.map`.

Rows are made here: short texts with one of four classes as CSV, conversations of two short turns as JSON lines. Each
measurement is a process of its own that reads, prepares and tokenises them and makes the first batch, as a run does
before anything is compiled; the peer loads and maps the same rows with the same tokenizer, in two processes. Libraries
are imported before the clock starts. Memory is what the process has for itself, at its peak (anonymous pages: others
are those of files, which the system takes back when it needs them) and all that it ever had resident (`ru_maxrss`).
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from text_classification import machine, new_result, revision, save, versions

Tree = dict[str, Any]
KINDS = ("classification", "chat")
TOKENIZER = "asset:minilm"
LABELS = ("calm", "dull", "glad", "sore")
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
LENGTH = 64
VALIDATION = 0.001  # of the rows


def main() -> None:
    """Measure everything, keep it and show it."""
    options = parse_options()
    if options.child:
        side, kind, file = options.child
        print(json.dumps({"ours": ours, "peer": peer}[side](kind, file)))
        return
    report: Tree = {"revision": revision(), "machine": machine(), "versions": versions(), "load": os.getloadavg()[0]}
    report["runs"] = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for kind in options.kinds:
            for rows in options.rows:
                report["runs"].append(measured(kind, rows, Path(scratch), options.peer))
                save(options.out, report)
    show(report)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--scratch", help="where rows and caches are put; about 6 GB for 1e7 short rows")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="measure datasets.map too")
    parser.add_argument("--out", type=Path, help="report; left out: a new file in results/")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out or new_result(Path(__file__).stem)
    return options


def measured(kind: str, rows: int, scratch: Path, with_peer: bool) -> Tree:
    """A number of rows of a kind: ours cold, ours warm, the peer."""
    home = scratch / f"{kind}-{rows}"
    home.mkdir()
    file = write_rows(kind, rows, home)
    found: Tree = {"kind": kind, "rows": rows, "bytes": file.stat().st_size}
    for name in ("cold", "warm"):
        found[name] = in_child("ours", kind, file)
    if with_peer:
        found["peer"] = in_child("peer", kind, file)
    subprocess.run(["rm", "-r", str(home)], check=True)
    return found


def in_child(side: str, kind: str, file: Path) -> Tree:
    """A measurement in a process of its own, with caches beside the rows."""
    caches = {
        "SFT_JAX_CACHE": str(file.parent / "cache"),
        "HF_HOME": str(file.parent / "hf"),
        "TMPDIR": str(file.parent),
    }
    from sft_jax import assets

    command = [sys.executable, __file__, "--child", side, kind, str(file)]
    environment = {**os.environ, **caches, "TOKENIZER": assets.resolve(TOKENIZER), "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def write_rows(kind: str, count: int, home: Path) -> Path:
    """Rows that are all different, of words of the tokenizer's vocabulary; 8 to 24 of them in a text."""
    from tokenizers import Tokenizer

    from sft_jax import assets

    draw = random.Random(0)
    vocabulary = Tokenizer.from_file(f"{assets.resolve(TOKENIZER)}/tokenizer.json").get_vocab()
    words = sorted(word for word in vocabulary if word.isascii() and word.isalpha() and len(word) > 2)

    def text() -> str:
        return " ".join(draw.choices(words, k=draw.randint(8, 24)))

    file = home / ("rows.csv" if kind == "classification" else "rows.jsonl")
    with open(file, "w", encoding="utf-8") as sink:
        if kind == "classification":
            sink.write("text,label\n")
        for _ in range(count):
            if kind == "classification":
                sink.write(f"{text()},{draw.choice(LABELS)}\n")
                continue
            turns = [{"role": role, "content": text()} for role in ("user", "assistant")]
            sink.write(json.dumps({"messages": turns}) + "\n")
    (home / "template.jinja").write_text(TEMPLATE)
    return file


def ours(kind: str, file: str) -> Tree:
    """Stages of a run until its first batch."""
    from sft_jax import inputs, mesh
    from sft_jax.config.read import read_config
    from sft_jax.weights.files import find

    classes = ["task.kind=sequence_classification", "task.text=text", "task.label=label"]
    chats = ["task.kind=causal_lm", "task.format=chat", f"task.template={Path(file).with_name('template.jinja')}"]
    config = read_config(
        [],
        [
            f"run.dir={Path(file).parent / 'run'}",
            f"model.source={os.environ['TOKENIZER']}",
            *(classes if kind == "classification" else chats),
            "data.source.kind=files",
            f"data.source.train={file}",
            f"data.split.validation={VALIDATION}",
            f"data.max_length={LENGTH}",
            "mesh.data=1",
        ],
    )
    stages, memory = {}, {}
    with watched(memory):
        begun = time.perf_counter()
        task, rows, _ = inputs.read_rows(config)
        stages["read and prepare"] = time.perf_counter()
        tokenizer = task.reader.load(find(config.model.source, None, weights=False))
        data = inputs.encode(config, task, rows, tokenizer)
        stages["tokenise"] = time.perf_counter()
        batches, _ = inputs.make_batches(config, mesh.make_mesh(config.mesh), rows, data, tokenizer)
        stages["lay out"] = time.perf_counter()
        first = batches[0]
        stages["first batch"] = time.perf_counter()
    count = sum(len(part) for part in rows.values())
    return {
        **told(begun, stages, memory, count),
        "tokens": int(sum(found.offsets[-1] for found in data.values())),
        "first": int(first["input_ids"].sum()),
    }


def peer(kind: str, file: str) -> Tree:
    """The same by `datasets`: load, map in two processes."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(os.environ["TOKENIZER"])
    tokenizer.chat_template = TEMPLATE
    datasets.disable_progress_bars()

    def of_texts(batch: Tree) -> Tree:
        return tokenizer(batch["text"], truncation=True, max_length=LENGTH)

    def of_chats(batch: Tree) -> Tree:
        texts = tokenizer.apply_chat_template(batch["messages"], tokenize=False)
        return tokenizer(texts, truncation=True, max_length=LENGTH, add_special_tokens=False)

    stages, memory = {}, {}
    with watched(memory):
        begun = time.perf_counter()
        table = datasets.load_dataset("csv" if kind == "classification" else "json", data_files=file, split="train")
        stages["read and prepare"] = time.perf_counter()
        mapped = table.map(of_texts if kind == "classification" else of_chats, batched=True, num_proc=2)
        stages["tokenise"] = time.perf_counter()
        tokens = mapped[:32]["input_ids"]
        stages["first batch"] = time.perf_counter()
    return {**told(begun, stages, memory, len(mapped)), "first": sum(map(sum, tokens))}


def told(begun: float, stages: dict[str, float], memory: Tree, rows: int) -> Tree:
    """Seconds of stages that ended at these times, and what the process has had."""
    edges = [begun, *stages.values()]
    seconds = {name: end - begin for name, begin, end in zip(stages, edges[:-1], edges[1:], strict=True)}
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": seconds,
        "total": edges[-1] - begun,
        "rows_a_second": rows / (edges[-1] - begun),
        "rss": most,
        **memory,
    }


@contextmanager
def watched(found: Tree) -> Iterator[None]:
    """Put the most anonymous memory that the process has meanwhile into `found`, and that at the beginning."""
    over = threading.Event()
    found["anonymous_before"] = found["anonymous"] = anonymous()

    def watch() -> None:
        while not over.wait(0.02):
            found["anonymous"] = max(found["anonymous"], anonymous())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def anonymous() -> int:
    """Bytes of memory of this process that are of no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def show(report: Tree) -> None:
    """A table of what was measured."""
    table = Table("rows", "side", "read", "tokenise", "lay out", "batch", "in all", "rows/s", "anonymous", "resident")
    for run in report["runs"]:
        for side in ("cold", "warm", "peer"):
            if side in run:
                found = run[side]
                seconds = [
                    found["seconds"].get(name) for name in ("read and prepare", "tokenise", "lay out", "first batch")
                ]
                cells = ["" if value is None else f"{value:.2f}" for value in [*seconds, found["total"]]]
                memory = [f"{found[name] / 2**30:.2f} GiB" for name in ("anonymous", "rss")]
                table.add_row(f"{run['rows']:,} {run['kind']}", side, *cells, f"{found['rows_a_second']:,.0f}", *memory)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
