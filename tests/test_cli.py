"""The command line: the whole way from a file of rows to an exported model, and the ways in which it can stop.

Commands run inside this process unless signals or the process itself are what is tested.
"""

import contextlib
import csv
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
from chats import write_decoder, write_talks
from conftest import SMALL, WORDS, write_model, write_questions, write_rows
from pictures import RESNET, VIT, coloured, encode, write_vision
from translations import write_marian, write_pairs

import sft_jax
from sft_jax import machine
from sft_jax.__main__ import main
from sft_jax.config.read import read_config, write_config
from sft_jax.config.schema import Config

EXAMPLES = sorted((Path(sft_jax.__file__).parents[1] / "configs").glob("**/*.yaml"))


class Said(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


def sft_jax_command(*words: object, stdin: str | bytes = "") -> Said:
    """Run `sft-jax` with these words in this process; bytes of standard input as the C locale reads them."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    given = io.StringIO(stdin) if isinstance(stdin, str) else io.BytesIO(stdin)
    if isinstance(given, io.BytesIO):
        given = io.TextIOWrapper(io.BufferedReader(given), "ascii", errors="surrogateescape")
    with (
        mock.patch.object(sys, "argv", ["sft-jax", *map(str, words)]),
        mock.patch.object(sys, "stdin", given),
        mock.patch.dict(os.environ, {machine.RELAUNCHED: "1"}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    return Said(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny model, rows, and `base.yaml` that trains the one on the others."""
    home = tmp_path_factory.mktemp("cli")
    write_model(home / "tiny", SMALL)
    for seed, split in enumerate(("train", "validation", "test")):
        write_rows(home / f"{split}.csv", 40, seed, longest=10)
    base = {
        "run": {"dir": str(home / "run")},
        "model": {"source": str(home / "tiny")},
        "task": {"kind": "sequence_classification", "labels": ["bad", "good"]},
        "data": {
            "source": {"kind": "files", **{s: str(home / f"{s}.csv") for s in ("train", "validation", "test")}},
            "max_length": 16,
            "layout": {"kind": "padded"},
        },
        "train": {"batch_size": 8, "log_every": 1},
        "optim": {"lr": 0.003},
        "eval": {"batch_size": 8},
        "mesh": {"data": 1},
    }
    (home / "base.yaml").write_text(write_config(Config.model_validate(base)))
    return home


@pytest.fixture(scope="module")
def trained(home: Path) -> Said:
    """`base.yaml`, trained for four steps."""
    said = sft_jax_command("train", home / "base.yaml", "train.steps=4", "eval.every=2")
    assert said.code == 0, said.err
    return said


def records(text: str) -> list[dict]:
    """A JSON object on each line."""
    return [json.loads(line) for line in text.splitlines()]


# Train, evaluate, predict, export.


def test_train(trained: Said, home):
    """Without a terminal there are plain lines, one for each step and validation, and tables before and after."""
    assert "\x1b" not in trained.out and trained.err == ""
    assert re.findall(r"^step (\d)/4  loss \d\.\d{4}  lr ", trained.out, re.M) == list("1234")
    assert re.findall(r"^validation at step (\d)  loss ", trained.out, re.M) == ["2", "4"]
    for part in ("text, label read; none not used", "initialised  head/out/kernel", "confusion matrix", "this run"):
        assert part in trained.out
    assert f"sft-jax predict {home / 'run' / 'model'}" in trained.out
    files = {"config.yaml", "data.json", "ledger.jsonl", "manifest.json", "metrics.jsonl", "summary.json"}
    expected = files | {"run.lock", "review.json", "predictions.jsonl", "report.html", "checkpoints", "events", "model"}
    assert {file.name for file in (home / "run").iterdir()} == expected


def test_train_again_is_done_already(trained: Said, home):
    """The same command again trains nothing and comes to the same scores."""
    before = (home / "run" / "model" / "model.safetensors").read_bytes()
    again = sft_jax_command("train", home / "base.yaml", "train.steps=4", "eval.every=2")
    assert again.code == 0 and not re.search(r"^step ", again.out, re.M)
    assert (home / "run" / "model" / "model.safetensors").read_bytes() == before
    other = sft_jax_command("train", home / "base.yaml", "train.steps=5", "eval.every=2")
    assert other.code == 65 and "train.steps: 4 there, 5 now" in other.err


def test_dry_run(home, tmp_path):
    """R30: what a step needs of each of eight devices is said by its parts, without weights and without a file; where
    that does not fit, settings that would are found."""
    bare = tmp_path / "bare"
    shutil.copytree(home / "tiny", bare, ignore=shutil.ignore_patterns("*.safetensors"))
    before = sorted(tmp_path.rglob("*"))
    words = ("train", "--dry-run", home / "base.yaml", f"run.dir={tmp_path / 'run'}", f"model.source={bare}")
    cache = {"SFT_JAX_CACHE": str(tmp_path / "cache")}
    with mock.patch.dict(os.environ, cache):
        said = sft_jax_command(*words, "--memory", "1GB", "mesh.data=8", "train.batch_size=16")
        assert said.code == 0 and "on each of 8 devices" in said.out and "1.0 GB: fits" in said.out, said.err
        for part in ("parameters", "optimizer", "batch", "temporary", "in all", "compiling"):
            assert re.search(rf"^ +{part} ", said.out, re.M), part
        less = sft_jax_command(*words, "--memory", "20KB", "mesh={data: 4, fsdp: 2}", "train.batch_size=16")
    assert sorted(tmp_path.rglob("*")) == before
    found = re.findall(r"(train\.accumulate=2|mesh\.fsdp=8).*", less.out)  # of remat it is the compiler who decides
    sizes = [float(size) for size in re.findall(r"(?:=\w+ +│ +)([\d.]+) kB", less.out)]
    assert len(sizes) > 2 and sizes == sorted(sizes, reverse=True), less.out
    assert "does not fit" in less.out and {"train.accumulate=2", "mesh.fsdp=8"} <= {*found}
    for size in ("much", "16", "0GB", "16XB"):
        assert sft_jax_command(*words, "--memory", size).code == 2, size
    assert sft_jax_command("train", home / "base.yaml", "--memory", "1GB").code == 2


def test_evaluate(trained: Said, home):
    """The scores of `evaluate` are those that the run ended with, and each split and step can be asked for."""
    summary = json.loads((home / "run" / "summary.json").read_text())
    said = sft_jax_command("evaluate", home / "run")
    assert said.code == 0 and f"test at step {summary['best_step']}" in said.out
    for name, value in summary["test"].items():
        assert re.search(rf"{name}\W+{value:.4f}\b", said.out), name
    latest = sft_jax_command("evaluate", home / "run", "--split", "validation", "--at", "latest")
    assert latest.code == 0 and "validation at step 4" in latest.out
    assert sft_jax_command("evaluate", home / "run", "--split", "tset").code == 2
    assert sft_jax_command("evaluate", home / "run", "--at", "lates").code == 2
    assert sft_jax_command("evaluate", home / "tiny").code == 65


def test_predict(trained: Said, home, tmp_path):
    """Texts of stdin, a text file, a CSV and JSON lines are labelled alike, in order; `--raw` adds the logits."""
    model, texts = home / "run" / "model", [*WORDS[:9], "bara “quoted”, with a comma"]
    typed = sft_jax_command("predict", model, stdin="\n".join([*texts, "", "  "]))
    assert typed.code == 0, typed.err
    *found, empty, blank = records(typed.out)
    assert (empty, blank) == tuple({"line": len(texts) + n, "error": "no text: a blank line"} for n in (1, 2))
    assert "2 of 12 have an error in place of an answer, such as line 11: a blank line" in typed.err
    typed = sft_jax_command("predict", model, stdin="\n".join(texts))
    assert records(typed.out) == found and typed.err == ""
    assert len(found) == len(texts) and all(set(record) == {"label", "scores"} for record in found)
    assert all(record["label"] == max(record["scores"], key=record["scores"].get) for record in found)
    assert len({json.dumps(record) for record in found}) > 1, "the same for every text"

    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    (tmp_path / "texts.jsonl").write_text(
        "\n".join(json.dumps({"text": t, "number": 1}) for t in texts), encoding="utf-8"
    )
    with open(tmp_path / "texts.csv", "w", encoding="utf-8", newline="") as sink:
        csv.writer(sink).writerows([["number", "text"], *enumerate(texts)])
    for name in ("texts.txt", "texts.jsonl", "texts.csv"):
        assert sft_jax_command("predict", model, tmp_path / name).out == typed.out, name
    assert sft_jax_command("predict", model, stdin=(tmp_path / "texts.jsonl").read_text("utf-8")).out == typed.out

    raw = records(sft_jax_command("predict", model, "--raw", "--batch-size", 3, stdin="\n".join(texts)).out)
    assert [record["label"] for record in raw] == [record["label"] for record in found]
    for record in raw:
        best = record["logits"].index(max(record["logits"]))
        assert ["bad", "good"][best] == record["label"] and len(record["logits"]) == 2


def test_predict_nothing(trained: Said, home):
    """No line gives no record and no error; where no line can be answered, their records say so and it is an error."""
    assert sft_jax_command("predict", home / "run" / "model", stdin="") == (0, "", "")
    said = sft_jax_command("predict", home / "run" / "model", stdin="\n \n")
    assert said.code == 65 and [record["line"] for record in records(said.out)] == [1, 2]
    assert said.err.startswith("input: nothing could be answered: 2 problems\n  - line 1: a blank line")


def test_predict_into_a_file(trained: Said, home, tmp_path):
    """A run stands for its model; records go into a file whole, with columns carried on; what was cut is said."""
    with open(tmp_path / "rows.csv", "w", newline="") as sink:
        csv.writer(sink).writerows([["ticket", "body", ""], [911, "bara", 0], [112, "", 1], [3, "cela " * 40, 2]])
    words = ["predict", home / "run", tmp_path / "rows.csv", "--columns", "text=body", "--keep", "ticket"]
    said = sft_jax_command(*words, "-o", tmp_path / "out.csv")
    assert (said.code, said.out) == (0, ""), said.err
    with open(tmp_path / "out.csv", newline="") as source:
        found = [*csv.DictReader(source)]
    assert [row["ticket"] for row in found] == ["911", "112", "3"] and found[1]["line"] == "3"
    assert found[1]["error"].startswith("no text") and [row["truncated"] for row in found] == ["", "", "true"]
    for part in (
        "out.csv has 3 records",
        "1 of 3 texts were cut to 16 tokens",
        "1 of 3 have an error in place of an",
        "column 3 has no name",
    ):
        assert part in said.err
    again = sft_jax_command(*words, "-o", tmp_path / "out.csv")
    assert again.code == 2 and "is there already; give another name, or --force" in again.err
    left = sft_jax_command(*words, "-o", tmp_path / "out.csv", "--force", "--bad-rows", "drop")
    assert left.code == 0 and "out.csv has 2 records" in left.err and "were left out" in left.err
    stopped = sft_jax_command(*words, "--bad-rows", "error")
    assert (stopped.code, stopped.out) == (65, "") and "rows.csv, line 3: body is" in stopped.err


def test_bytes_of_no_text_under_any_locale(trained: Said, home):
    """S (case 42): a byte that is not UTF-8, which the locale of containers makes a surrogate of, has its line."""
    good, bad = records(sft_jax_command("predict", home / "run" / "model", stdin=b"bara\nx\xff\n").out)
    assert good["label"] and bad["line"] == 2 and "not UTF-8 (byte 0xff at character 2)" in bad["error"]


def test_evaluate_a_file(trained: Said, home, tmp_path):
    """Newcomer 1: the scores of a run's own test rows, as a file, are those of its evaluation, tables and all."""
    own = sft_jax_command("evaluate", home / "run", "-o", tmp_path / "own.json")
    assert own.code == 0, own.err
    rows = [row.split(",") for row in (home / "test.csv").read_text().splitlines()[1:]]
    file = tmp_path / "new.csv"
    with open(file, "w", newline="") as sink:
        csv.writer(sink).writerows(
            [["id", "body", "kind"], *([n, text, ["bad", "good"][int(k)]] for n, (text, k) in enumerate(rows))]
        )
    words = ["evaluate", home / "run", "--data", file, "--columns", "text=body,label=kind"]
    said = sft_jax_command(*words, "-o", tmp_path / "new.json", "--predictions", tmp_path / "new.jsonl")
    assert said.code == 0 and f"{len(rows)} rows" in said.out and "confusion matrix" in said.out, said.err
    found, expected = (json.loads((tmp_path / name).read_text()) for name in ("new.json", "own.json"))
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)
    assert found["tables"] == expected["tables"] and found["rows"] == len(rows)
    predicted = records((tmp_path / "new.jsonl").read_text())
    right = sum(record["truth"] == record["label"] for record in predicted) / len(rows)
    assert (
        right == pytest.approx(expected["metrics"]["accuracy"])
        and predicted[3]["id"] == 3
        and predicted[3]["place"].endswith("line 5")
    )
    model = sft_jax_command("evaluate", home / "run" / "model", *words[2:])
    assert model.out == said.out

    with open(file, "a") as sink:
        sink.write("9,bara,goood\n")
    unknown = sft_jax_command(*words)
    assert unknown.code == 65 and f"new.csv, line {len(rows) + 2}: " in unknown.err and "'goood'" in unknown.err
    left = sft_jax_command(*words, "--bad-rows", "drop")
    assert left.code == 0 and "1 rows were left out, such as" in left.err
    for more in (["--split", "test"], ["mesh.data=1"], ["--at", "best"]):
        assert "is for a split of a run" in sft_jax_command(*words, *more).err
    assert "is for --data" in sft_jax_command("evaluate", home / "run", "--columns", "text=body").err


def test_what_to_try_next(trained: Said, home):
    """Newcomer 1: what is shown to be typed is a text of the run's own rows, quoted, and it works as it stands."""
    command = re.search(r"try it +(echo .*)$", trained.out, re.M)
    assert command
    echo, text, *rest = shlex.split(command[1])
    assert echo == "echo" and rest == ["|", "sft-jax", "predict", str(home / "run" / "model")]
    assert text and text in (home / "test.csv").read_text() and len(text) <= 60
    assert len(records(sft_jax_command(*rest[2:], stdin=f"{text}\n").out)) == 1
    assert re.search(r"on new labels +sft-jax evaluate .*/model --data rows\.csv$", trained.out, re.M)


def test_predict_errors(trained: Said, home, tmp_path):
    """What cannot be predicted from, or on, is one message and its exit code."""
    model = home / "run" / "model"
    for words in (
        [tmp_path / "nowhere"],
        [model, tmp_path / "nowhere.csv"],
        [model, home / "base.yaml"],
        [home / "tiny"],
    ):
        said = sft_jax_command("predict", *words, stdin="bara")
        assert said.code == 65 and said.out == "" and "Traceback" not in said.err and ": " in said.err


def test_export(trained: Said, home, tmp_path):
    """A step of a run is written as a directory that predicts as the run's own does; a used one is refused."""
    best = json.loads((home / "run" / "summary.json").read_text())["best_step"]
    said = sft_jax_command("export", home / "run", tmp_path / "a" / "model")
    assert said.code == 0 and said.out.startswith(
        f"step {best} of {home / 'run'} is in {tmp_path / 'a' / 'model'}; try"
    )
    one, other = (
        sft_jax_command("predict", model, "--raw", stdin="bara bare\ncela")
        for model in (tmp_path / "a" / "model", home / "run" / "model")
    )
    assert one == other and len(records(one.out)) == 2
    assert sft_jax_command("export", home / "run", tmp_path / "latest", "--at", "latest").out.startswith("step 4 of ")
    again = sft_jax_command("export", home / "run", tmp_path / "latest")
    assert again.code == 65 and "is there already, and not an empty directory; give a new one" in again.err
    (tmp_path / "file").touch()
    assert sft_jax_command("export", home / "run", tmp_path / "file").code == 65


def test_report(trained: Said, home):
    """The report is written again from what is on disk, the same to the byte; without a run there is none."""
    page = home / "run" / "report.html"
    before = page.read_bytes()
    page.unlink()
    said = sft_jax_command("report", home / "run")
    assert said == (0, f"{page} is written; open it in a browser\n", "") and page.read_bytes() == before
    nothing = sft_jax_command("report", home)
    assert nothing.code == 65 and "holds no run (no config.yaml); give the run.dir" in nothing.err


def test_compare(trained: Said, home, tmp_path):
    """Two runs are put side by side on the screen and on a page; what cannot be compared is said."""
    other = shutil.copytree(home / "run", tmp_path / "other", ignore=shutil.ignore_patterns("checkpoints", "model"))
    settings = other / "config.yaml"
    settings.write_text(settings.read_text().replace("lr: 0.003", "lr: 0.004"))
    page = tmp_path / "compared.html"
    said = sft_jax_command("compare", home / "run", other, "--metric", "accuracy", "--html", page)
    assert said.code == 0 and said.err == ""
    for part in ("test accuracy", "Settings that differ", "optim.lr", "0.004", f"{page} is written"):
        assert part in re.sub(r"\s+", " ", said.out)
    assert re.search(r"┃ run +┃ +run ┃ +other ┃", said.out), "too wide for 80 columns, and not on its side"
    assert "<svg" in page.read_text()
    alone = sft_jax_command("compare", home / "run")
    assert alone.code == 2 and "give two run directories or more" in alone.err
    assert sft_jax_command("compare", home / "run", tmp_path).code == 65


# Looking at configurations.


def test_config_check(home):
    """`config check` says ok, or everything that is wrong, and leaves with 2."""
    assert sft_jax_command("config", "check", home / "base.yaml") == (0, "ok\n", "")
    wrong = sft_jax_command("config", "check", home / "base.yaml", "train.stepz=3", "optim.lr=0")
    assert wrong.code == 2 and wrong.out == "" and "train.stepz: unknown key; did you mean 'steps'?" in wrong.err
    assert "2 problems" in wrong.err
    nothing = sft_jax_command("config", "check", "train.steps=3")
    assert nothing.code == 2 and nothing.err.startswith(
        "command line: no configuration file; give one, such as configs/"
    )


@pytest.mark.parametrize("command", ["check", "show", "schema", "ls"])
def test_config_starts_nothing(home, command):
    """R29: the `config` commands import neither jax nor the data libraries."""
    words = [home / "base.yaml"] if command in ("check", "show") else []
    program = (
        "import sys\nfrom sft_jax.__main__ import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "config", command, *words], capture_output=True, text=True, check=True
    )
    assert "pydantic" in done.stderr.split() and not {"jax", "flax", "datasets", "numpy"} & set(done.stderr.split())
    assert done.stdout


def test_config_show(home, tmp_path):
    """What is shown is the whole configuration, and means the same when it is read."""
    shown = sft_jax_command("config", "show", home / "base.yaml", "seed=3", "train.freeze=['embed/**']")
    (tmp_path / "shown.yaml").write_text(shown.out)
    config = read_config([tmp_path / "shown.yaml"])
    assert config == read_config([home / "base.yaml"], ["seed=3", "train.freeze=['embed/**']"])
    assert sft_jax_command("config", "show", tmp_path / "shown.yaml").out == shown.out


def test_config_schema(home):
    """The JSON Schema has every section with its keys, and the configuration that is shown fits it."""
    schema = json.loads(sft_jax_command("config", "schema").out)
    tree = read_config([home / "base.yaml"]).model_dump(mode="json")
    assert unknown_to(schema, tree, schema) == []
    assert unknown_to(schema, {**tree, "train": {**tree["train"], "stepz": 3}}, schema) == ["train.stepz"]
    assert set(schema["required"]) == {"model", "task", "data"}
    with contextlib.suppress(ImportError):
        import jsonschema

        jsonschema.validate(tree, schema)


def unknown_to(schema: dict, tree: object, part: dict, path: str = "") -> list[str]:
    """The keys of a tree that a part of a schema does not have."""
    if not isinstance(tree, dict):
        return []
    parts = [part, *part.get("anyOf", []), *part.get("oneOf", []), *part.get("allOf", [])]
    parts = [schema["$defs"][p["$ref"].rpartition("/")[2]] if "$ref" in p else p for p in parts]
    known = {key: inner for p in parts for key, inner in p.get("properties", {}).items()}
    if not known:  # keys are free here
        return []
    nested = [unknown_to(schema, tree[key], known[key], f"{path}{key}.") for key in tree if key in known]
    return [f"{path}{key}" for key in tree if key not in known] + [name for names in nested for name in names]


def test_recipes(tmp_path):
    """The recipes are listed with their first line, and can be copied, but not over something else."""
    listed = sft_jax_command("config", "ls").out.splitlines()
    assert [line.split()[0] for line in listed] == [file.stem for file in EXAMPLES if file.parent.name == "configs"]
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in listed)
    mine = tmp_path / "new" / "mine.yaml"
    said = sft_jax_command("config", "cp", "quickstart", mine)
    assert said == (0, f"{mine} is yours; run it with: sft-jax train {mine}\n", "")
    assert mine.read_text() == next(file for file in EXAMPLES if file.stem == "quickstart").read_text()
    assert "is there already; give a new file" in sft_jax_command("config", "cp", "quickstart", mine).err
    unknown = sft_jax_command("config", "cp", "quikstart", tmp_path / "other.yaml")
    assert unknown.code == 2 and "did you mean 'quickstart'?" in unknown.err


def test_help():
    """Without a command, or with an unknown one, there is help, and no traceback."""
    said = sft_jax_command("--help")
    assert said.code == 0 and all(
        word in said.out
        for word in (
            "train",
            "evaluate",
            "predict",
            "chat",
            "export",
            "convert",
            "goodput",
            "report",
            "compare",
            "config",
            "data",
        )
    )
    unknown = sft_jax_command("trian")
    assert unknown.code == 2 and "Traceback" not in unknown.err and "trian" in unknown.err


# The data report.


def test_data_report(home, tmp_path):
    """C9, S10: what becomes of the rows is shown without training, and without weights or a run directory."""
    model = tmp_path / "without-weights"
    model.mkdir()
    shutil.copyfile(home / "tiny" / "tokenizer.json", model / "tokenizer.json")
    file = tmp_path / "rows.csv"
    rows = [
        ("bara [/b] bare", 0),
        ("bara [/b] bare", 0),
        ("", 1),
        ("cela", 1),
        ("cela", 0),
        ("dora " * 30, 1),
        ("fena", 0),
    ]
    with open(file, "w", newline="") as sink:
        csv.writer(sink).writerows([("text", "label"), *rows])
    settings = [
        f"data.source.train={file}",
        "data.bad_rows=drop",
        "data.most_bad=0.2",
        "data.duplicates=drop",
        "data.augment.swap=0.1",
    ]
    words = [home / "base.yaml", f"model.source={model}", f"run.dir={tmp_path / 'run'}", *settings]
    said = sft_jax_command("data", "report", *words)
    assert said.code == 0 and said.err == "", said.err
    for part in ("train", "duplicate", "dropped", "conflict", "kept", "no text", "'bara [/b] bare'", "text is ''"):
        assert part in said.out, part
    plain = sft_jax_command("data", "report", *words, "--json")
    train = json.loads(plain.out)["splits"]["train"]
    assert (train["read"], train["used"], train["dropped"]) == (7, 5, {"no text": 1, "duplicate": 1})
    assert train["conflicts"] == 2 and train["labels"] == {"bad": 3, "good": 2}
    tokens = train["tokens"]
    assert tokens["truncated"] == 1 and tokens["truncated_share"] == 0.2 and tokens["supervised"] is None
    assert tokens["lengths"]["max"] == 16 and 0 < tokens["padding_share"] < 1
    assert not (tmp_path / "run").exists()
    assert sft_jax_command("data", "report", *words, "data.max_length=0").code == 2


def test_data_report_of_a_run(trained: Said, home):
    """C9: a run directory holds the report that the command gives, and `train` shows it."""
    words = [home / "base.yaml", "train.steps=4"]
    assert (home / "run" / "data.json").read_text() == sft_jax_command("data", "report", *words, "--json").out
    shown = sft_jax_command("data", "report", *words).out
    assert shown.strip() and shown.strip() in trained.out


# Examples: the files in configs/.


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_example_is_right(file):
    """Every file in configs/ passes `config check`, and its header says what it is and what to expect."""
    assert sft_jax_command("config", "check", file) == (0, "ok\n", "")
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert len(header) >= 3 and any("expected" in line for line in header)


def write_translated(config: Config, home: Path) -> Path:
    """Pairs under the names that a configuration reads them by, nested where these are."""
    rows = [json.loads(line) for line in write_pairs(home / "pairs.jsonl", len(WORDS)).read_text().splitlines()]
    file, written = home / "rows.jsonl", []
    for row in rows:
        found: dict = {}
        for side in ("source", "target"):
            head, _, rest = getattr(config.task, side).partition(".")
            found = {**found, head: {**found.get(head, {}), rest: row[side]} if rest else row[side]}
        written.append(json.dumps(found) + "\n")
    file.write_text("".join(written))
    return file


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_example_runs(file, home, tmp_path):
    """Every file in configs/ runs when it is shrunk: a tiny model, few rows with its columns, two steps."""
    config = read_config([file])
    if config.task.kind == "causal_lm":
        rows, model = write_talks(tmp_path / "rows.jsonl", len(WORDS)), write_decoder(tmp_path / "decoder")
    elif config.task.kind == "seq2seq":
        rows, model = write_translated(config, tmp_path), write_marian(tmp_path / "marian")
    elif config.task.kind == "token_classification":
        rows, model = write_tagged(config, tmp_path / "rows.jsonl"), home / "tiny"
    elif config.task.kind == "question_answering":
        rows, model = write_questions(tmp_path / "rows.jsonl", len(WORDS), silent=False), home / "tiny"
    elif config.task.kind == "image_classification":
        rows, model = write_seen(config, tmp_path / "rows.jsonl"), tmp_path / "eye"
        write_vision(model, RESNET if "resnet" in config.model.source else VIT)
    else:
        rows, model = write_labelled(config, tmp_path / "rows.csv"), home / "tiny"
    given = {split: str(rows) for split in ("train", "validation", "test") if getattr(config.data.source, split)}
    shrunk = [
        f"run.dir={tmp_path / 'run'}",
        f"model.source={model}",
        "model.revision=null",
        f"data.source={json.dumps({'kind': 'files', **given})}",
        f"data.max_length={128 if config.task.kind in ('causal_lm', 'image_classification') else 16}",
        "data.layout.length=null",
        *(["task.stride=4"] if config.task.kind == "question_answering" else []),
        *(["task.size=16"] if config.task.kind == "image_classification" else []),
        *(["data.split.validation=0.25"] if config.data.split.validation else []),  # of few rows of many classes
        "train.steps=2",
        "train.batch_size=8",
        "train.accumulate=" + str(min(8, config.train.accumulate)),
        *(["eval.answers=8", "task.generate.max_new_tokens=9"] if config.task.kind == "seq2seq" else []),
        "eval.batch_size=8",
    ]
    said = sft_jax_command("train", file, *shrunk)
    assert said.code == 0, said.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2
    assert bool(summary["baselines"]) == config.eval.baselines
    found = records(sft_jax_command("predict", tmp_path / "run" / "model", rows).out)
    answers = {
        "sequence_classification": "label",
        "multi_label_classification": "labels",
        "regression": "score",
        "token_classification": "tags",
        "causal_lm": "answer",
        "question_answering": "answer",
        "seq2seq": "answer",
        "image_classification": "label",
    }
    assert len(found) == len(WORDS) and all(answers[config.task.kind] in record for record in found)


def write_tagged(config: Config, rows: Path) -> Path:
    """JSON lines of short rows of words, with the columns that a configuration names."""
    lines = [{config.task.words: [word, "bara"], config.task.tags: ["B-X", "O"]} for word in WORDS]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return rows


def write_seen(config: Config, rows: Path) -> Path:
    """JSON lines with the paths of images and the column and labels that a configuration names."""
    names, lines = config.task.labels or ["0", "1"], []
    for number, (_, found) in enumerate(coloured(len(WORDS))):
        file = rows.with_name(f"{number}.png")
        file.write_bytes(encode(found))
        lines.append({config.task.image: str(file), config.task.label: names[number % len(names)]})
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return rows


def write_labelled(config: Config, rows: Path) -> Path:
    """A CSV of short texts with the columns and labels that a configuration names."""
    names = ["0.5", "-1"] if config.task.kind == "regression" else config.task.labels or ["0", "1"]
    columns = [config.task.text, *filter(None, [config.task.text_pair]), config.task.label]
    groups = [config.eval.group] if config.eval.group else []
    with open(rows, "w", newline="") as sink:
        texts = [[f"{word} {WORDS[i // 2]}"] * (len(columns) - 1) for i, word in enumerate(WORDS)]
        cells = [[*text, names[i % len(names)], *(["x", "y"][i % 2] for _ in groups)] for i, text in enumerate(texts)]
        csv.writer(sink).writerows([[*columns, *groups], *cells])
    return rows


# Stopping.


def test_not_finite(home, tmp_path):
    """C10: training that leaves the numbers ends with 76 and the step, and what is not finite is not saved."""
    words = ["train", home / "base.yaml", f"run.dir={tmp_path / 'run'}", "train.steps=6", "optim.name=sgd"]
    said = sft_jax_command(*words, "optim.lr=1e30", "optim.clip=null", "eval.every=never")
    assert said.code == 76 and re.match(
        r"step \d: loss .*; the checkpoints before it are good: lower optim.lr", said.err
    )
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_interrupted(home, tmp_path):
    """R5: Ctrl-C saves, leaves with 130 and names the command that goes on; that command goes on with the next step."""
    command = [Path(sys.executable).with_name("sft-jax"), "train", str(home / "base.yaml")]
    command += [f"run.dir={tmp_path / 'run of mine'}", "train.steps=1000000", "eval.every=never"]
    first, said = interrupt(command)
    assert first == 1 and said.code == 130, said.err
    stopped = re.search(r"stopped and saved at step (\d+) of 1000000; to go on: (sft-jax train .*)$", said.err, re.M)
    assert stopped, said.err
    assert "Traceback" not in said.err + said.out and "\x1b" not in said.out
    again = [command[0], *shlex.split(stopped[2])[1:]]
    assert again[1:] == command[1:]
    first, said = interrupt(again)
    assert first == int(stopped[1]) + 1 and said.code == 130


def interrupt(command: list) -> tuple[int, Said]:
    """(the first step that is reported, what is left) of a training process that is interrupted at that step."""
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        shown = []
        for line in process.stdout:
            shown.append(line)
            if line.startswith("step "):
                process.send_signal(signal.SIGINT)
                break
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    number = re.match(r"step (\d+)/", shown[-1]) if shown else None
    assert number, "".join(shown) + err
    return int(number[1]), Said(process.returncode, "".join(shown) + out, err)
