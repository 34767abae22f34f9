"""The same files give the same bytes wherever a run is started: hash seed, directory, user, locale, caches."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chats import LLAMA, said, write_decoder
from exact_runs import metrics_lines

KNOWN = (
    "JAX_PLATFORMS",
    "XLA_FLAGS",
    "JAX_ENABLE_COMPILATION_CACHE",
    "GLIBC_TUNABLES",
)  # what tests set for all processes
# What stands in a run directory and says nothing of times or of where it was run.
KEPT = "data.json", "predictions.jsonl"


def call(**arguments: Any) -> dict:
    """An answer that is a call of a tool."""
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


def talks(shift: int) -> list[dict]:
    """Rows as people's files have them: other keys in each, in other orders, of other types, null among them."""
    each = [
        {"a": 1},
        {"b": 2},
        {"a": "text"},
        {"a": 1, "b": 2},
        {"b": 3.5, "a": 4},
        {"b": None, "c": [1, "x"]},
        {"days": 5, "deep": {"y": 1, "x": {"q": True}}},
        {"days": 2.5, "deep": {"x": "дом", "y": None}},
        {"c": [{"k": 1}, {"l": "z"}], "a": False},
    ]
    rows = []
    for number, arguments in enumerate(each[shift:] + each[:shift]):
        schema = {key: {"type": "string", "default": None} for key in arguments}
        parameters = {"properties": schema, "required": [*arguments]}
        tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        messages = [said("user", f"Вопрос {number}"), call(**arguments), said("tool", "42"), said("assistant", "да!")]
        rows.append({"messages": messages, "tools": [tool], "meta": [number, arguments][number % 2]})
    return rows


# Becomes a user whom this machine does not know, who may read whatever root may, as an image is made for; then runs the
# command that it is given. Where tests do not run as root, it stays who it is, and the home alone is missing.
NOBODY = """
import ctypes, os, sys
if os.getuid() == 0:
    libc, reading = ctypes.CDLL(None), 2  # CAP_DAC_READ_SEARCH
    libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
    os.setgroups([])
    os.setgid(54321)
    os.setuid(54321)
    libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[1 << reading] * 3, 0, 0, 0))
    libc.prctl(47, 2, reading, 0, 0)  # PR_CAP_AMBIENT_RAISE, so that it outlives exec
os.execv(sys.argv[1], sys.argv[1:])
"""


def start(home: Path, seed: int, *through: str, **environment: str) -> subprocess.Popen[bytes]:
    """`sft-jax train` of the common configuration in a directory of its own, under a hash seed."""
    known = {name: os.environ[name] for name in ("PATH", *KNOWN) if name in os.environ}
    environment |= {"PYTHONHASHSEED": str(seed), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [*through, sys.executable, "-m", "sft_jax", "train", "../config.yaml"]
    with open(home / "log", "wb") as log:
        return subprocess.Popen(command, cwd=home, env=known | environment, stdout=log, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs of one configuration: two users' machines, and a container without home, user, locale or cache."""
    work = tmp_path_factory.mktemp("anywhere")
    model = write_decoder(work / "model", {**LLAMA, "max_position_embeddings": 512}, "chatml")
    files = {}
    for shift, split in enumerate(("train", "validation", "test")):
        files[split] = work / f"{split}.jsonl"
        lines = [json.dumps(row, ensure_ascii=False) for row in talks(shift)]
        files[split].write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "run": {"dir": "run"},
        "model": {"source": str(model), "dropout": 0.1},
        "task": {"kind": "causal_lm", "format": "chat", "tools": "tools", "generate": {"max_new_tokens": 4}},
        "data": {"source": {"kind": "files", **{s: str(f) for s, f in files.items()}}, "max_length": 512},
        "train": {"batch_size": 3, "steps": 4, "log_every": 1},
        "eval": {"every": 2, "samples": 2, "batch_size": 4},
        "mesh": {"data": 1},
    }
    config["data"]["layout"] = {"kind": "padded", "buckets": 1}
    (work / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    homes = [work / "first", work / "second place", work / "Третье"]
    for home in homes:
        home.mkdir(mode=0o777)
        home.chmod(0o777)
    started = [start(home, seed, HOME=str(home), LC_ALL="C.UTF-8") for seed, home in enumerate(homes[:2])]
    started.append(start(homes[2], 2, sys.executable, "-c", NOBODY, LC_ALL="POSIX", TMPDIR=str(homes[2])))
    codes = [process.wait(timeout=300) for process in started]
    assert codes == [0, 0, 0], "\n".join((home / "log").read_text(encoding="utf-8")[-3000:] for home in homes)
    return [home / "run" for home in homes]


@pytest.mark.parametrize("other", [1, 2])
def test_the_same_files_give_the_same_bytes_anywhere(runs: list[Path], other: int):
    """F1, M, R54: under another hash seed, in another directory, and in a container, a run has the same rows, tokens,
    metrics, predictions and model, to the byte."""
    first, second = runs[0], runs[other]
    assert len([line for line in metrics_lines(first) if line["kind"] == "train"]) == 4
    assert metrics_lines(first) == metrics_lines(second)
    for name in KEPT:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    exported = [{file.name: file.read_bytes() for file in (run / "model").iterdir()} for run in (first, second)]
    assert exported[0] == exported[1] and "model.safetensors" in exported[0]
    manifests = [json.loads((run / "manifest.json").read_text(encoding="utf-8")) for run in (first, second)]
    for name in ("data", "weights", "tokenizer"):
        assert manifests[0].get(name) == manifests[1].get(name), name


def test_a_container_is_left_as_it_was(runs: list[Path]):
    """M: without a home no directory called ~ appears, what is kept is private, and nothing is said of it."""
    home = runs[2].parent
    assert not (home / "~").exists() and not list(home.glob("**/~"))
    log = (home / "log").read_text(encoding="utf-8")
    assert "Traceback" not in log and "Warning" not in log and "Вопрос" in log, log
    if os.getuid() == 0:
        assert (home / "sft_jax-54321").stat().st_mode & 0o777 == 0o700
