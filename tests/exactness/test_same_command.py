"""The same command gives the same bytes, in whatever process it runs and whether or not it was stopped between."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from exact_runs import metrics_lines, settings, small_model, train_until

from sft_jax.config.read import write_config

NAMES = ("first", "second", "stopped")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> dict[str, Path]:
    """Three runs of `sft-jax train` in fresh processes, the last one stopped before in another process."""
    work, model = tmp_path_factory.mktemp("commands"), small_model(tmp_path_factory)
    started = []
    fresh = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}  # each compiles for itself
    for name in NAMES:
        home = work / name
        home.mkdir()
        config = settings(Path("run"), model, rows, "model.dropout=0.1", "eval.every=5")
        (home / "config.yaml").write_text(write_config(config), encoding="utf-8")
        if name == "stopped":
            train_until(settings(home / "run", model, rows, "model.dropout=0.1", "eval.every=5"), 8)
            assert metrics_lines(home / "run")[-1]["step"] == 8
        command = [sys.executable, "-m", "sft_jax", "train", "config.yaml"]
        with open(home / "log", "w") as log:
            started.append(subprocess.Popen(command, cwd=home, stdout=log, stderr=subprocess.STDOUT, env=fresh))
    codes = [process.wait(timeout=240) for process in started]
    assert codes == [0, 0, 0], "".join((work / name / "log").read_text()[-3000:] for name in NAMES)
    return {name: work / name / "run" for name in NAMES}


def exported(directory: Path) -> dict[str, bytes]:
    """Every file of the exported model."""
    return {file.name: file.read_bytes() for file in sorted((directory / "model").iterdir())}


def test_the_same_command_twice_gives_the_same_bytes(directories: dict[str, Path]):
    """R54: metrics minus times, the exported model, the configuration and the manifest minus attempts are equal."""
    first, second = directories["first"], directories["second"]
    assert len([line for line in metrics_lines(first) if line["kind"] == "train"]) == 14
    assert metrics_lines(first) == metrics_lines(second)
    assert exported(first) == exported(second) and "model.safetensors" in exported(first)
    assert (first / "config.yaml").read_bytes() == (second / "config.yaml").read_bytes()
    manifests = [json.loads((run / "manifest.json").read_text()) for run in (first, second)]
    attempts = [manifest.pop("attempts") for manifest in manifests]
    assert manifests[0] == manifests[1]
    commands = [[attempt["command"] for attempt in found] for found in attempts]
    assert commands[0] == commands[1] == [["sft-jax", "train", "config.yaml"]]
    scores = [json.loads((run / "summary.json").read_text()) for run in (first, second)]
    for key in ("test", "validation", "best_step", "padding_share"):
        assert scores[0][key] == scores[1][key]


def test_a_resume_in_a_new_process_gives_the_same_bytes(directories: dict[str, Path]):
    """R1, C11: stopped in one process at step 8 and finished by a new one, the run is the one that was not stopped."""
    assert metrics_lines(directories["first"]) == metrics_lines(directories["stopped"])
    assert exported(directories["first"]) == exported(directories["stopped"])
