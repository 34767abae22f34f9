"""Checkpoints that mean harm: pickles, broken headers, names that escape, configurations that name code."""

import importlib.util
import io
import json
import pickle
import socket
import struct
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from sft_jax.data.text import load_tokenizer
from sft_jax.errors import ModelError
from sft_jax.infer.predict import load_predictor
from sft_jax.models.family import Head, build_model, load_model
from sft_jax.run import prepare
from sft_jax.weights.files import open_checkpoint

INDEX = "model.safetensors.index.json"
LINK = "is a link to another place; copy that file here if you trust it"


class Payload:
    """A pickle that writes a canary when it is opened."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def pickled(canary: Path) -> bytes:
    """The payload as the oldest `.bin` files hold theirs."""
    return pickle.dumps({"weight": Payload(canary)})


def zipped(canary: Path) -> bytes:
    """The payload as `torch.save` writes it today."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(canary))
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def message(directory: Path) -> str:
    """The one line that opening a directory ends with."""
    with pytest.raises(ModelError) as error:
        open_checkpoint(directory)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def with_config(directory: Path, **extra) -> Path:
    """A directory with a sound `config.json` and nothing else."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**TINY, **extra}))
    return directory


@pytest.mark.parametrize("form", [pickled, zipped])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt", "model.pkl"])
def test_pickles_are_never_opened(form, name, tmp_path):
    """R31: a pickled checkpoint, plain or zipped, is refused unread, and the error says safetensors."""
    home, canary = with_config(tmp_path / "model"), tmp_path / "canary"
    (home / name).write_bytes(form(canary))
    assert "safetensors" in message(home) and name in message(home)
    assert not canary.exists()


def test_pickled_shards_are_never_opened(tmp_path):
    """R31: neither an index of pickles nor a safetensors index that names pickles opens one."""
    home, canary = with_config(tmp_path / "model"), tmp_path / "canary"
    shard = "pytorch_model-00001-of-00001.bin"
    (home / shard).write_bytes(pickled(canary))
    index = json.dumps({"metadata": {}, "weight_map": {"weight": shard}})
    (home / "pytorch_model.bin.index.json").write_text(index)
    assert "safetensors" in message(home)
    (home / INDEX).write_text(index)
    with pytest.raises(ModelError, match=r"'weight': its file is named 'pytorch_model-00001-of-00001\.bin'"):
        open_checkpoint(home)
    (home / INDEX).unlink()
    (home / "model.safetensors").write_bytes(zipped(canary))
    assert "not a whole safetensors file" in message(home)
    assert not canary.exists()


def test_a_pickle_beside_safetensors_is_ignored(tmp_path):
    """R31: where both are there the safetensors are read, for a whole run's preparation and for prediction."""
    home, canary = write_model(tmp_path / "model", head=2), tmp_path / "canary"
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (home / name).write_bytes(zipped(canary))
    assert len(list(load_predictor(str(write_labels(home)))(["bara"]))) == 1
    assert not canary.exists()


def test_a_run_refuses_a_pickle(tmp_path, configure):
    """R31: the whole way from a configuration ends at the same error."""
    home, canary = write_model(tmp_path / "model"), tmp_path / "canary"
    (home / "model.safetensors").unlink()
    (home / "pytorch_model.bin").write_bytes(pickled(canary))
    with pytest.raises(ModelError, match="safetensors"):
        prepare(configure(f"model.source={home}"))
    assert not canary.exists()


def test_the_payload_is_live(tmp_path):
    """R31: negative control: unpickling the payload does leave the canary."""
    pickle.loads(pickled(tmp_path / "canary"))
    assert (tmp_path / "canary").exists()


def write_labels(home: Path) -> Path:
    """Let a tiny checkpoint say that it classifies."""
    config = json.loads((home / "config.json").read_text())
    config |= {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "no", "1": "yes"}}
    (home / "config.json").write_text(json.dumps(config))
    return home


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """A sound safetensors file, small enough to break at every byte."""
    file = tmp_path_factory.mktemp("whole") / "model.safetensors"
    save_file({"first": np.arange(6, dtype=np.float32).reshape(2, 3), "second": np.ones(2, np.float16)}, file)
    return file.read_bytes()


def read_all(home: Path, content: bytes) -> dict[str, np.ndarray]:
    """Every tensor of a directory whose one weight file has this content."""
    (home / "model.safetensors").write_bytes(content)
    checkpoint = open_checkpoint(home)
    return {name: checkpoint.read(name) for name in checkpoint.shapes}


def test_a_file_cut_anywhere_is_refused(whole, tmp_path):
    """R32: a file that was cut at any byte is an error of ours that names it; the whole file is read."""
    home = with_config(tmp_path)
    assert len(read_all(home, whole)) == 2
    for length in range(len(whole)):
        with pytest.raises(ModelError, match=r"model\.safetensors: not a whole safetensors file"):
            read_all(home, whole[:length])


@given(data=st.data())
@settings(
    max_examples=300,
    deadline=1000,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_broken_bytes_never_end_in_another_error(data, whole, tmp_path_factory):
    """R32: whatever bytes are changed, the file is read or refused within a second, with no other kind of error."""
    home = with_config(tmp_path_factory.getbasetemp() / "fuzz")
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        read_all(home, bytes(content))
    except ModelError as error:
        assert len(str(error).splitlines()) == 1


def header(entries: str, data: int = 8) -> bytes:
    """A file with this header and some zeros."""
    return struct.pack("<Q", len(entries)) + entries.encode() + b"\0" * data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**12) + b"{}",
        header("[" * 10_000),
        header('{"a": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4000000000000]}}'),
        header('{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 8]}}'),
        header('{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}'),
        header('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}'),
        header('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "F32", "shape": [2], '
               '"data_offsets": [0, 8]}}'),
        header('{"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}'),
        header('{"a": 7}'),
    ],
    ids=["empty", "no header", "huge header", "large header", "deep", "terabytes", "overflow", "negative", "backwards",
         "overlap", "type", "number"],
)  # fmt: skip
def test_malformed_headers_are_refused(content, tmp_path):
    """R32: sizes beyond the file, overlaps, unknown types and depth end in one line, and nothing is allocated."""
    (with_config(tmp_path) / "model.safetensors").write_bytes(content)
    assert "not a whole safetensors file" in message(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "sub/inside.safetensors", "..", "", 7, None, ["a"], "x\0.safetensors"],
)
def test_shard_names_stay_in_the_directory(name, tmp_path):
    """R32: a shard that an index names elsewhere is refused, even where a sound file lies there."""
    home = with_config(tmp_path / "home")
    (home / "sub").mkdir()
    for place in (tmp_path / "outside.safetensors", home / "sub" / "inside.safetensors"):
        save_file({"weight": np.zeros(2, np.float32)}, place)
    (home / INDEX).write_text(json.dumps({"weight_map": {"weight": name}}))
    with pytest.raises(ModelError) as error:
        open_checkpoint(home)
    assert "a shard lies beside the index" in str(error.value) or "not a whole safetensors file" in str(error.value)


def test_an_index_must_agree_with_its_shards(tmp_path):
    """R32: a tensor that the index names and no shard holds, or a shard that is not there, is named."""
    home = with_config(tmp_path)
    save_file({"there": np.zeros(2, np.float32)}, home / "a.safetensors")
    (home / INDEX).write_text(json.dumps({"weight_map": {"there": "a.safetensors"}}))
    assert list(open_checkpoint(home).shapes) == ["there"]
    (home / INDEX).write_text(json.dumps({"weight_map": {"there": "a.safetensors", "gone": "a.safetensors"}}))
    with pytest.raises(ModelError, match=r"  - 'gone': expected in a\.safetensors, found in no file"):
        open_checkpoint(home)
    (home / INDEX).write_text(json.dumps({"weight_map": {"there": "b.safetensors"}}))
    assert "b.safetensors: not a whole safetensors file" in message(home)
    for empty in ({}, {"weight_map": {}}, {"weight_map": ["a"]}):
        (home / INDEX).write_text(json.dumps(empty))
        assert "no weight_map" in message(home)


def test_a_link_to_another_file_shows_nothing_of_it(tmp_path):
    """R32: a file of a checkpoint that is a link to another place is refused, and nothing of it is in the message."""
    secret = tmp_path / "secret"
    secret.write_text("password-canary-0123456789 " * 20)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "vocab.txt"):
        home = write_model(tmp_path / f"with {name}")
        (home / "apart.bin").symlink_to(secret)  # is never read
        assert open_checkpoint(home).shapes
        (home / name).unlink(missing_ok=True)
        (home / name).symlink_to(secret)
        with pytest.raises(ModelError) as error:
            open_checkpoint(home)
        assert str(error.value) == f"{home}: 1 problem\n  - {name}: {LINK}"


def test_links_within_a_checkpoint_are_followed(tmp_path):
    """R32: a link to a file of the same directory is read, also where the directory is itself reached by a link."""
    home = write_model(tmp_path / "home")
    (home / "model.safetensors").rename(home / "weights")
    (home / "model.safetensors").symlink_to("weights")
    (tmp_path / "other").symlink_to(home)
    assert open_checkpoint(home).shapes == open_checkpoint(tmp_path / "other").shapes


def test_links_to_blobs_of_another_repository_are_refused(tmp_path):
    """R32: in the cache of the hub, a snapshot reaches the blobs of its own repository, and nothing else."""
    home = write_model(tmp_path / "models--a--b" / "snapshots" / "abc")
    for place in ("models--a--b/blobs", "models--c--d/blobs", "models--a--b/refs"):
        (tmp_path / place).mkdir(parents=True)
        file = (home / "model.safetensors").resolve()
        file.rename(tmp_path / place / "1234")
        (home / "model.safetensors").unlink(missing_ok=True)
        (home / "model.safetensors").symlink_to(tmp_path / place / "1234")
        if place == "models--a--b/blobs":
            assert open_checkpoint(home).shapes
            continue
        with pytest.raises(ModelError, match=LINK):
            open_checkpoint(home)


def test_a_tensor_in_two_shards(tmp_path):
    """R32: a tensor that stands in two shards, or in one that the index does not name for it, is refused by name."""
    home = with_config(tmp_path)
    save_file({"one": np.zeros(2, np.float32)}, home / "a.safetensors")
    save_file({"one": np.ones(2, np.float32), "two": np.ones(2, np.float32)}, home / "b.safetensors")
    (home / INDEX).write_text(json.dumps({"weight_map": {"one": "a.safetensors", "two": "b.safetensors"}}))
    with pytest.raises(ModelError, match=r"'one': expected in a\.safetensors, found in a\.safetensors and b\.safeten"):
        open_checkpoint(home)
    (home / INDEX).write_text(json.dumps({"weight_map": {"two": "b.safetensors"}}))
    with pytest.raises(ModelError, match=r"'one': in b\.safetensors, not in the index"):
        open_checkpoint(home)


SIZES = st.one_of(st.integers(-2, 9), st.sampled_from([10**12, 2**31, 2**32, 2**62, 2**63, 2**64, 1e3, "2", None, []]))
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "F4", "X", "", 7]),
        "shape": st.one_of(st.lists(SIZES, max_size=4), SIZES),
        "data_offsets": st.one_of(st.lists(SIZES, max_size=3), SIZES),
    }
)
HEADERS = st.dictionaries(st.one_of(st.text(max_size=9), st.just("__metadata__")), ENTRIES, max_size=3)


@given(content=HEADERS, spare=st.integers(0, 64))
@settings(
    max_examples=300,
    deadline=1000,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_made_up_headers_never_end_in_another_error(content, spare, tmp_path_factory):
    """R32: whatever a header claims of types, shapes and places, its tensors are read or refused within a second."""
    home = with_config(tmp_path_factory.getbasetemp() / "headers")
    try:
        for array in read_all(home, header(json.dumps(content), spare)).values():
            assert array.nbytes <= spare
    except ModelError as error:
        assert len(str(error).splitlines()) == 1


OPENER = f"""
import resource, sys
from pathlib import Path
from sft_jax.errors import ModelError
from sft_jax.weights.files import open_checkpoint
resource.setrlimit(resource.RLIMIT_AS, ({1 << 30}, {1 << 30}))
for home in map(Path, sys.argv[1:]):
    try:
        open_checkpoint(home)
        print("opened")
    except ModelError as error:
        print(error)
"""


def test_claims_of_terabytes_cost_no_memory(tmp_path):
    """R32: 10**12 numbers in a header, a gigabyte of JSON and a header longer than its file end in bounded memory."""
    entry = '{{"a": {{"dtype": "F32", "shape": {}, "data_offsets": {}}}}}'.format
    files = {
        "numbers": header(entry([10**12], [0, 4 * 10**12])),
        "none of many": header(entry([10**12, 0], [0, 0]), 0),
        "long": struct.pack("<Q", 3 << 30) + b"{}",
    }
    for name, content in files.items():
        (with_config(tmp_path / name) / "model.safetensors").write_bytes(content)
    with open(with_config(tmp_path / "json") / "config.json", "r+b") as file:
        file.truncate(4 << 30)  # takes no room on the disk
    homes = [str(tmp_path / name) for name in (*files, "json")]
    done = subprocess.run([sys.executable, "-c", OPENER, *homes], capture_output=True, text=True, check=True)
    numbers, none, long, text = done.stdout.splitlines()
    assert "not a whole safetensors file" in numbers and "not a whole safetensors file" in long
    assert none == "opened" and "bytes of JSON; fetch the checkpoint again" in text


@pytest.fixture
def offline(monkeypatch):
    """No connection can be made and no name looked up; the attempts are counted."""
    attempts = []

    def refused(*arguments, **_):
        attempts.append(arguments)
        raise OSError("no network in this test")

    for place, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
        monkeypatch.setattr(place, name, refused)
    return attempts


CODE = "from pathlib import Path\nPath({canary!r}).touch()\nclass Evil: pass\n"
HOSTILE = {
    "auto_map": {
        "AutoConfig": "modeling_evil.Evil",
        "AutoModelForSequenceClassification": "modeling_evil.Evil",
        "AutoTokenizer": ["modeling_evil.Evil", "modeling_evil.Evil"],
    },
    "trust_remote_code": True,
    "custom_pipelines": {"text-classification": {"impl": "modeling_evil.Evil"}},
    "_attn_implementation_internal": "some-user/evil-kernel",
    "_experts_implementation_internal": "some-user/evil-kernel",
    "_name_or_path": "/home/someone/secret",
}


def hostile(home: Path, canary: Path, fast: bool) -> Path:
    """A classifier whose `config.json` and tokenizer name code that lies beside them."""
    write_labels(write_model(home, HOSTILE, head=2))
    (home / "modeling_evil.py").write_text(CODE.format(canary=str(canary)))
    (home / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": HOSTILE["auto_map"], "trust_remote_code": True, "tokenizer_class": "BertTokenizer"})
    )
    if not fast:
        vocabulary = json.loads((home / "tokenizer.json").read_text())["model"]["vocab"]
        (home / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)))
        (home / "tokenizer.json").unlink()
    return home


@pytest.mark.parametrize("fast", [True, False], ids=["tokenizer.json", "vocab.txt"])
def test_a_configuration_runs_and_fetches_nothing(fast, tmp_path, monkeypatch, offline):
    """R33: code that `config.json` or the tokenizer names is neither imported nor fetched, and is not kept."""
    canary = tmp_path / "canary"
    home = hostile(tmp_path / "model", canary, fast)
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(str(home))  # an attempt to import would succeed
    records = list(load_predictor(str(home))(["bara cela", "doro"]))
    assert [record["label"] in ("no", "yes") for record in records] == [True, True]
    assert not canary.exists() and "modeling_evil" not in sys.modules and not offline
    kept = open_checkpoint(home).config
    assert not set(kept) & set(HOSTILE)
    assert load_tokenizer(home).fast.encode("bara").tokens == ["[CLS]", "bara", "[SEP]"]


def test_a_hostile_configuration_changes_no_number(tmp_path):
    """R33: the model is the one that the same `config.json` without those keys describes."""
    hostile(tmp_path / "evil", tmp_path / "canary", True)
    write_model(tmp_path / "plain", head=2)
    evil, plain = (open_checkpoint(tmp_path / name) for name in ("evil", "plain"))
    built = [build_model(c.config, Head("sequence_classification", 2), "x") for c in (evil, plain)]
    assert built[0].config == built[1].config and built[0].template.keys == built[1].template.keys
    arrays = [load_model(model, c)[1] for model, c in zip(built, (evil, plain), strict=True)]
    assert all((arrays[0][path] == arrays[1][path]).all() for path in arrays[1])


def test_the_controls_of_these_tests_work(tmp_path, offline):
    """R33: negative control: the code does leave the canary when run, and a fetch is refused and counted."""
    canary = tmp_path / "canary"
    file = hostile(tmp_path / "model", canary, True) / "modeling_evil.py"
    spec = importlib.util.spec_from_file_location("evil_for_this_test", file)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert canary.exists()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen("http://127.0.0.1:9")
    assert offline
