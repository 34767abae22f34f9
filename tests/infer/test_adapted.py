"""Several adapters on one base: the same answers as each merged model gives by itself."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ONE_SHAPE
from typer.testing import CliRunner

from sft_jax.cli import app
from sft_jax.errors import ConfigError, DataError, ModelError
from sft_jax.infer.adapted import load_adapted
from sft_jax.infer.predict import load_predictor, read_inputs
from sft_jax.jobs import export, train
from sft_jax.jobs import trained as restored
from sft_jax.run import initial, open_run, prepare

TEXTS = ["bara cela", "doro", "fena gulum hino", "jata", "kolo bara"]
KINDS = {"one": "{rank: 2}", "two": "{rank: 3, kind: dora, match: ['**/mlp/*'], scaling: root}"}


@pytest.fixture
def trained(configure: Callable, tmp_path: Path) -> dict[str, Path]:
    """Two runs on one base with adapters of different forms and seeds."""
    for seed, (name, adapter) in enumerate(KINDS.items()):
        more = ("train.steps=4", "optim.lr=3e-2", "data.source.test=null", ONE_SHAPE, f"seed={seed}")
        train(prepare(configure(f"run.dir={tmp_path / name}", f"adapter={adapter}", *more)))
    return {name: tmp_path / name for name in KINDS}


def test_rows_pick_their_adapter(trained, tiny: Path, tmp_path: Path):
    """C17, C19: each row is answered as the merged model of its adapter answers it; the base is in memory once."""
    loaded = load_adapted(str(tiny), [f"{name}={run / 'adapter'}" for name, run in trained.items()])
    merged = {name: list(load_predictor(str(run / "model"))(TEXTS, raw=True)) for name, run in trained.items()}
    chosen = ["two", "one", "one", "two", "one"]
    assert any(merged["one"][row] != merged["two"][row] for row in range(5))
    lines = [
        json.dumps({"id": row, "text": text, "adapter": name})
        for row, (text, name) in enumerate(zip(TEXTS, chosen, strict=True))
    ]
    records = list(loaded(read_inputs("", loaded.task, lines), raw=True))
    assert [record["id"] for record in records] == [*range(5)]
    for row, record in enumerate(records):
        expected = merged[chosen[row]][row]
        assert record["label"] == expected["label"]
        np.testing.assert_allclose(record["logits"], expected["logits"], rtol=1e-4, atol=1e-5)
    alone = load_adapted(str(tiny), [f"mine={trained['two'] / 'adapter'}"])
    for record, expected in zip(alone(TEXTS, raw=True), merged["two"], strict=True):
        np.testing.assert_allclose(record["logits"], expected["logits"], rtol=1e-4, atol=1e-5)
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    words = ["predict", str(tiny), str(tmp_path / "rows.jsonl")]
    for name, run in trained.items():
        words += ["--adapter", f"{name}={run / 'adapter'}"]
    found = CliRunner().invoke(app, words, catch_exceptions=False)
    assert [json.loads(line)["label"] for line in found.stdout.splitlines()] == [r["label"] for r in records]


def test_mistakes_are_named(trained, tiny: Path):
    """Unknown adapters, rows that name none, and directories that are no adapter are said as such."""
    given = [f"{name}={run / 'adapter'}" for name, run in trained.items()]
    loaded = load_adapted(str(tiny), given)
    with pytest.raises(DataError, match="there are several: one, two"):
        list(loaded(TEXTS))
    rows = read_inputs("", loaded.task, [json.dumps({"text": "bara", "adapter": "onw"})])
    with pytest.raises(DataError, match=r"line 1: adapter 'onw'.*'one'"):
        list(loaded(rows))
    with pytest.raises(ConfigError, match="expected NAME=DIRECTORY"):
        load_adapted(str(tiny), [str(trained["one"] / "adapter")])
    with pytest.raises(ModelError, match=r"adapter_config.json"):
        load_adapted(str(tiny), [f"a={trained['one'] / 'model'}"])


def test_going_on_from_an_adapter(trained, configure: Callable, tmp_path: Path):
    """C17: `adapter.source` begins with the numbers of another run's adapter and head; another form is refused."""
    source = f"adapter.source={trained['two'] / 'adapter'}"
    run = prepare(configure(f"run.dir={tmp_path / 'on'}", f"adapter={KINDS['two']}", source, ONE_SHAPE))
    params = initial(run)[0].params
    first = restored(open_run(trained["two"]), "best")[0]
    assert params.keys() == first.params.keys()
    for path, array in first.params.items():
        np.testing.assert_allclose(params[path], array, rtol=1e-6, atol=1e-7, err_msg=path)
    with pytest.raises(ConfigError, match=r"adapter.source.*another form"):
        prepare(configure(f"run.dir={tmp_path / 'off'}", "adapter={rank: 3}", source))
    with pytest.raises(ConfigError, match=r"rank=3.*there.*rank=4"):
        prepare(configure(f"run.dir={tmp_path / 'off'}", f"adapter={KINDS['two']}", "adapter.rank=4", source))


def test_an_export_has_both_forms(trained, tmp_path: Path):
    """C19: `sft-jax export` writes the merged model, and the adapter beside it under a name of its own."""
    export(open_run(trained["one"]), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    names = {file.name for file in (tmp_path / "out-adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "config.json", "tokenizer.json", "README.md"} <= names
