"""Pickled weights become safetensors bit by bit; whatever else a pickle is, it is refused, and nothing of it is run."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, write_model
from safetensors.numpy import load_file, save_file

from sft_jax import convert as converting
from sft_jax.convert import convert
from sft_jax.errors import ModelError, RunError
from sft_jax.infer.predict import load_predictor
from sft_jax.run import prepare
from sft_jax.weights import pickles
from sft_jax.weights.files import open_checkpoint
from sft_jax.weights.pickles import read_pickle

FORMS = ["zip", "legacy"]


@pytest.fixture(scope="module")
def torch():
    """The library that the real files are written with; nothing else here needs it."""
    return pytest.importorskip("torch")


def saved(torch, content, file: Path, form: str, **options) -> Path:
    """A file that torch wrote in one of its two forms."""
    torch.save(content, file, _use_new_zipfile_serialization=form == "zip", **options)
    return file


def bits(torch, tensor) -> bytes:
    """The numbers of a torch tensor in order, as bytes."""
    plain = tensor.detach().contiguous()
    return (plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy().tobytes()


def of_all_kinds(torch) -> dict:
    """Tensors of every type, and views of every kind that share storages."""
    base = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    return {
        "plain": base,
        "transposed": base.t(),
        "sliced": base[1:4, ::2],
        "row": base[3],
        "expanded": torch.arange(3.0).expand(4, 3),
        "empty": torch.zeros(0, 3),
        "number": torch.tensor(3.5),
        "parameter": torch.nn.Parameter(base + 1),
        "half": base.half(),
        "bfloat": base.bfloat16().t(),
        "double": base.double(),
        "long": torch.arange(5),
        "int": torch.arange(5, dtype=torch.int32),
        "bool": torch.tensor([True, False]),
        "bytes": torch.arange(4, dtype=torch.uint8),
    }


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("form", FORMS)
def test_every_tensor_bit_by_bit(torch, form, protocol, tmp_path):
    """C6: what torch saved, in both forms, is read and written with equal bits, shapes and types, views included."""
    tensors = of_all_kinds(torch)
    file = saved(torch, OrderedDict(tensors), tmp_path / "weights.pt", form, pickle_protocol=protocol)
    notes = convert(file, tmp_path / "out")
    assert notes == [f"there is no config.json beside it: put that of the model it came from into {tmp_path / 'out'}"]
    for found in (read_pickle(file).tensors, load_file(tmp_path / "out" / "model.safetensors")):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].shape == tuple(tensor.shape), name
            assert str(tensor.dtype).removeprefix("torch.") == found[name].dtype.name, name
            assert np.ascontiguousarray(found[name]).tobytes() == bits(torch, tensor), name


@pytest.fixture
def source(torch, tmp_path) -> Path:
    """A tiny BERT as the hub keeps old ones: config.json, tokenizer, pytorch_model.bin."""
    home = write_model(tmp_path / "source", head=2)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in load_file(home / "model.safetensors").items()}
    (home / "model.safetensors").rename(tmp_path / "expected.safetensors")
    saved(torch, tensors, home / "pytorch_model.bin", "legacy")
    return home


def same(out: Path, expected: Path) -> bool:
    """Whether a converted directory holds these tensors and no others."""
    found, wanted = open_checkpoint(out), load_file(expected)
    return found.shapes.keys() == wanted.keys() and all(
        found.read(name).tobytes() == array.tobytes() for name, array in wanted.items()
    )


def test_a_converted_directory_is_trained_on(source, tmp_path, configure):
    """C6: weights, config.json and tokenizer come over, and the directory is one that a run is prepared from."""
    with pytest.raises(ModelError, match=f"runs nothing: sft-jax convert {source} NEW_DIRECTORY"):
        open_checkpoint(source)
    (source / "optimizer.pt").write_bytes(b"no")
    assert convert(source, tmp_path / "out") == []
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert same(tmp_path / "out", tmp_path / "expected.safetensors")
    run = prepare(configure(f"model.source={tmp_path / 'out'}"))
    assert len(run.matched.loaded) == len(run.model.template.keys)


def test_shards(torch, source, tmp_path):
    """C6: an index of pickles is followed; what it and the shards disagree about is named, and nothing is written."""
    tensors = torch.load(source / "pytorch_model.bin")
    (source / "pytorch_model.bin").unlink()
    names = sorted(tensors)
    parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, inside in parts.items():
        saved(torch, {name: tensors[name] for name in inside}, source / file, "zip")
    index = {name: file for file, inside in parts.items() for name in inside}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    convert(source, tmp_path / "out")
    assert same(tmp_path / "out", tmp_path / "expected.safetensors")
    wrong = {**index, names[0]: "pytorch_model-2.bin", "made.up": "pytorch_model-1.bin"}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": wrong}))
    message = refusal(source, tmp_path)
    assert "2 problems" in message and "'made.up': expected in pytorch_model-1.bin, found in no file" in message
    escaping = {**index, names[0]: "../pytorch_model-1.bin"}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": escaping}))
    assert "a shard lies beside the index" in refusal(source, tmp_path)


def test_tied_weights_stand_under_each_name(torch, tmp_path):
    """C6: a tensor that two parameters share is written under both names, and `transformers` reads what it wrote."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**{k: v for k, v in TINY.items() if k != "model_type"}, tie_word_embeddings=True)
    model = transformers.BertForMaskedLM(config).eval()
    config.save_pretrained(tmp_path / "source")
    saved(torch, model.state_dict(), tmp_path / "source" / "pytorch_model.bin", "zip")
    convert(tmp_path / "source", tmp_path / "out")
    shapes = open_checkpoint(tmp_path / "out").shapes
    assert {"cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"} <= shapes.keys()
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("key", pickles.WRAPPERS)
def test_wrapped_weights(torch, key, tmp_path):
    """C6: weights inside a training checkpoint are found, and all that is left out is named."""
    content = {key: {"a": torch.ones(2), "epoch": 3}, "optimizer": {"lr": 1.0}, "step": 7}
    found = read_pickle(saved(torch, content, tmp_path / "a.pt", "zip"))
    assert list(found.tensors) == ["a"]
    assert found.notes == [
        "left out: 'optimizer', which is no tensor",
        "left out: 'step', which is no tensor",
        f"the weights are those under '{key}'",
        "left out: 'epoch', which is no tensor",
    ]


def refusal(source: Path, tmp_path: Path) -> str:
    """What converting ends with; nothing is written, not even in part."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ModelError) as caught:
        convert(source, tmp_path / "refused")
    assert sorted(tmp_path.rglob("*")) == before
    return str(caught.value)


def test_misfits_are_named_before_anything_is_written(torch, source, tmp_path):
    """C8: a tensor that the family of config.json does not have, lacks, or has in another shape, is named."""
    tensors = torch.load(source / "pytorch_model.bin")
    moved = tensors.pop("bert.embeddings.LayerNorm.weight")
    tensors["bert.embeddings.LayerNorm.weigth"] = moved
    tensors["bert.encoder.layer.0.output.dense.bias"] = torch.zeros(3)
    saved(torch, tensors, source / "pytorch_model.bin", "zip")
    message = refusal(source, tmp_path)
    assert "bert.embeddings.LayerNorm.weight: not in the checkpoint" in message
    assert "bert.encoder.layer.0.output.dense.bias: shape (3,)" in message
    (source / "config.json").write_text(json.dumps({"model_type": "made-up"}))
    assert convert(source, tmp_path / "out") == [
        "model type 'made-up' is not known here, so names and shapes were not checked"
    ]


def test_where_there_is_nothing_to_convert(source, tmp_path):
    """R31: what is missing, already converted, ambiguous or in the way is said, with what to give instead."""
    assert "no such file or directory" in refusal(tmp_path / "nowhere", tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(RunError, match="not an empty directory; give a new one"):
        convert(source, tmp_path / "full")
    (source / "pytorch_model.bin").rename(source / "pretrained.pt")
    assert "no pytorch_model.bin.index.json; give one of its files: pretrained.pt" in refusal(source, tmp_path)
    assert convert(source / "pretrained.pt", tmp_path / "out") == []
    assert "holds safetensors already" in refusal(tmp_path / "out", tmp_path)
    (source / "vocab.txt").symlink_to("/etc/hostname")
    assert "vocab.txt: is a link to another place" in refusal(source / "pretrained.pt", tmp_path)


# Files that mean harm. They are written by hand, so that no torch is needed.


class Payload:
    """A pickle that calls something when it is opened."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def command(canary: Path) -> dict[str, bytes]:
    """Pickles that leave a canary when they are opened, each by another name."""
    by_inst = b"\x80\x02(" + text(f"touch {canary}") + b"ios\nsystem\n."
    stacked = pickle.dumps({"a": Payload(os.system, f"touch {canary}")}, protocol=4)
    return {
        "posix.system": pickle.dumps({"a": Payload(os.system, f"touch {canary}")}, protocol=2),
        "'posix.system'": stacked,
        "builtins.exec": pickle.dumps([Payload(exec, f"open({str(canary)!r}, 'w').close()")], protocol=4),
        "os.system": by_inst,
        "builtins.getattr": pickle.dumps(Payload(getattr, Payload(OrderedDict), "fromkeys"), protocol=4),
    }


def legacy(content: bytes) -> bytes:
    """A pickle where the old form has its own."""
    head = [pickles.MAGIC, pickles.PROTOCOL, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    return b"".join(pickle.dumps(part, protocol=2) for part in head) + content


def zipped(content: bytes, storages: dict[str, bytes] | None = None, **more: bytes) -> bytes:
    """A pickle and its storages as torch zips them."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        for key, numbers in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", numbers)
        for name, text in more.items():
            archive.writestr(f"archive/{name.replace('_pkl', '.pkl')}", text)
    return buffer.getvalue()


@pytest.mark.parametrize("form", [zipped, legacy, bytes], ids=["zip", "legacy", "bare"])
def test_canaries_are_not_run(form, tmp_path):
    """R31: a pickle that names os.system, exec or getattr, in either form, is refused by that name, and is not run."""
    canary, file = tmp_path / "canary", tmp_path / "weights.pt"
    for name, content in command(canary).items():
        file.write_bytes(form(content))
        message = refusal(file, tmp_path)
        assert message.startswith(f"{file}: names ") and name.strip("'") in message
        assert "nothing was run" in message and not canary.exists()


def test_the_canaries_are_live(tmp_path):
    """R31: negative control: opened as pickles, they do leave the canary."""
    canary = tmp_path / "canary"
    for name in ("posix.system", "builtins.exec", "os.system"):
        pickle.loads(command(canary)[name])
        assert canary.exists()
        canary.unlink()


def text(word: str) -> bytes:
    """A text on the stack of a pickle."""
    return b"X" + struct.pack("<I", len(word.encode("utf-8", "surrogatepass"))) + word.encode("utf-8", "surrogatepass")


def number(value: int) -> bytes:
    """A number on the stack of a pickle."""
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def row(values) -> bytes:
    """A tuple of numbers on the stack of a pickle."""
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(shape=(2, 3), strides=(3, 1), offset=0, count=6, key="0", kind=b"torch\nFloatStorage\n") -> bytes:
    """A tensor on the stack of a pickle, as torch declares it."""
    storage = b"(" + text("storage") + b"c" + kind + text(key) + text("cpu") + number(count) + b"tQ"
    build = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return build + storage + number(offset) + row(shape) + row(strides) + b"\x89}tR"


def state(**tensors: bytes) -> bytes:
    """A pickle of a dictionary."""
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in tensors.items()) + b"u."


NUMBERS = {"0": np.arange(6, dtype=np.float32).tobytes()}
BILLION = b"(" + b")" + b"q\x05h\x05\x86" * 60 + b"t"  # a tuple of tuples, 2**60 of them
HOSTILE = {
    "reaches beyond": (zipped(state(a=tensor((3, 3))), NUMBERS), "'a': reaches to number 9 of a storage that has 6"),
    "offset": (zipped(state(a=tensor(offset=1)), NUMBERS), "'a': reaches to number 7 of a storage that has 6"),
    "strides": (zipped(state(a=tensor(strides=(2**40, 1))), NUMBERS), "of a storage that has 6"),
    "negative stride": (zipped(state(a=tensor(strides=(-3, 1), offset=3)), NUMBERS), "are no sizes"),
    "negative size": (zipped(state(a=tensor((-1, 3))), NUMBERS), "are no sizes"),
    "negative offset": (zipped(state(a=tensor(offset=-1)), NUMBERS), "are no sizes"),
    "overflow": (zipped(state(a=tensor((2**62, 4), (0, 0))), NUMBERS), "bytes of tensors; do not trust it"),
    "10**12 numbers": (zipped(state(a=tensor((10**12,), (1,))), NUMBERS), "reaches to number 1000000000000"),
    "10**12 times one": (zipped(state(a=tensor((10**12,), (0,))), NUMBERS), "4000000000000 bytes of tensors"),
    "many names": (
        zipped(state(**{f"n{i}": tensor((10**6,), (0,)) for i in range(30)}), NUMBERS),
        "120000000 bytes of tensors",
    ),
    "10**12 in the storage": (zipped(state(a=tensor(count=10**12)), NUMBERS), "4000000000000 are declared"),
    "short storage": (zipped(state(a=tensor()), {"0": b"1234"}), "storage 0 has 4 bytes, 24 are declared"),
    "no storage": (zipped(state(a=tensor())), "archive/data/0"),
    "storage elsewhere": (zipped(state(a=tensor(key="../data.pkl")), NUMBERS), "archive/data/../data.pkl"),
    "other strides": (zipped(state(a=tensor(strides=(3, 1, 1))), NUMBERS), "do not fit"),
    "200 dimensions": (zipped(state(a=tensor((1,) * 200, (1,) * 200)), NUMBERS), "do not fit"),
    "unknown type": (
        zipped(state(a=tensor(kind=b"torch\nQInt8Storage\n")), NUMBERS),
        "names 'torch.QInt8Storage', which weights do not need",
    ),
    "no tensor": (zipped(state(a=number(7))), "holds no tensors by name"),
    "no dictionary": (zipped(b"\x80\x02" + tensor() + b".", NUMBERS), "holds no tensors by name"),
    "within itself": (zipped(b"\x80\x02}q\x00" + text("model") + b"h\x00s."), "holds no tensors by name"),
    "name with NUL": (zipped(state(**{"a\0b": tensor()}), NUMBERS), "not a name that a tensor can have"),
    "name of the header": (zipped(state(__metadata__=tensor()), NUMBERS), "not a name that a tensor can have"),
    "half a character": (zipped(state(**{"\ud800": tensor()}), NUMBERS), "not a name that a tensor can have"),
    "number for a name": (zipped(b"\x80\x02}" + number(7) + tensor() + b"s.", NUMBERS), "not a name"),
    "nested key": (zipped(b"\x80\x02}" + BILLION + tensor() + b"s.", NUMBERS), "a tuple as a key"),
    "nested shape": (zipped(state(a=tensor().replace(row((2, 3)), BILLION)), NUMBERS), "do not fit"),
    "call of a storage": (zipped(b"\x80\x02ctorch\nFloatStorage\n)R."), "a call of torch.FloatStorage"),
    "call of a text": (zipped(b"\x80\x02" + text("os") + b")R."), "a str used as a _Name"),
    "state of a name": (zipped(b"\x80\x02ctorch\nSize\n}" + text("a") + tensor() + b"sb."), "holds no tensors by name"),
    "empty stack": (zipped(b"\x80\x020."), "not a whole file of torch.save"),
    "no end": (zipped(b"\x80\x02}"), "not a whole file of torch.save"),
    "no pickle": (zipped(b""), "not a whole file of torch.save"),
    "script": (zipped(state(a=tensor()), NUMBERS, constants_pkl=b""), "a TorchScript program"),
    "big-endian": (zipped(state(a=tensor()), NUMBERS, byteorder=b"big"), "a big-endian machine"),
    "old and cut": (legacy(state(a=tensor())), "not a whole file of torch.save"),
    "old and large": (
        legacy(state(a=tensor(count=10**12)) + pickle.dumps(["0"], 2) + struct.pack("<q", 10**12)),
        "storage 0 is cut short",
    ),
    "old and other": (
        legacy(state(a=tensor()) + pickle.dumps(["0"], 2) + struct.pack("<q", 7) + bytes(28)),
        "storage 0 has 7 numbers, 6 are declared",
    ),
    "old and longer": (
        legacy(state(a=tensor()) + pickle.dumps(["0"], 2) + struct.pack("<q", 6) + NUMBERS["0"] + b"x"),
        "bytes follow that belong to no storage",
    ),
    "empty": (b"", "not a whole file of torch.save"),
    "text": (b"hello, world\n" * 9, "not a whole file of torch.save"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name, tmp_path):
    """R31: sizes, places and names that a file declares are checked before a number is read; the error says which."""
    content, said = HOSTILE[name]
    file = tmp_path / "weights.pt"
    file.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_pickle(file)
    assert said in str(caught.value) and str(caught.value).startswith(f"{file}: ")
    assert len(str(caught.value)) < 500


def test_the_hostile_files_differ_from_a_sound_one(tmp_path):
    """R31: negative control: files made by hand in the same way, but sound, are read."""
    old = legacy(state(a=tensor()) + pickle.dumps(["0"], 2) + struct.pack("<q", 6) + NUMBERS["0"])
    for content in (zipped(state(a=tensor()), NUMBERS, byteorder=b"little"), old):
        (tmp_path / "weights.pt").write_bytes(content)
        assert (read_pickle(tmp_path / "weights.pt").tensors["a"] == np.arange(6).reshape(2, 3)).all()


def test_a_zip_bomb(tmp_path):
    """R31: members that are packed, whatever size they claim, or that overlap, are refused before they are read."""
    file, buffer = tmp_path / "weights.pt", io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", state(a=tensor()))
        archive.writestr("archive/data/0", bytes(1 << 28))
    content = bytearray(buffer.getvalue())
    last = content.rindex(b"PK\x01\x02")
    for size in (1 << 28, 24):
        struct.pack_into("<I", content, last + 24, size)
        file.write_bytes(content)
        assert "packed, or overlap" in refusal(file, tmp_path)
    content = bytearray(zipped(state(a=tensor()), {"0": bytes(1 << 16), "1": b""}))
    first, last = content.index(b"PK\x01\x02"), content.rindex(b"PK\x01\x02")
    entry = content.index(b"PK\x01\x02", first + 1)
    content[last + 16 : last + 28] = content[entry + 16 : entry + 28]  # the checksum and sizes of the one before it
    content[last + 42 : last + 46] = content[entry + 42 : entry + 46]  # and its place
    file.write_bytes(content)
    assert "packed, or overlap" in refusal(file, tmp_path)


def test_a_file_cut_anywhere(torch, tmp_path):
    """R31: a file of torch that was cut at any of many bytes, or has a flipped one, is refused as not whole."""
    for form in FORMS:
        whole = saved(torch, {"a": torch.ones(9), "b": torch.ones(2)}, tmp_path / "whole.pt", form).read_bytes()
        (tmp_path / "cut.pt").write_bytes(whole)
        assert len(read_pickle(tmp_path / "cut.pt").tensors) == 2
        for length in range(0, len(whole), 7):
            (tmp_path / "cut.pt").write_bytes(whole[:length])
            with pytest.raises(ModelError, match="not a whole file"):
                read_pickle(tmp_path / "cut.pt")
    flipped = bytearray(saved(torch, {"a": torch.ones(9)}, tmp_path / "whole.pt", "zip").read_bytes())
    flipped[flipped.index(struct.pack("<9f", *[1.0] * 9))] ^= 1
    (tmp_path / "cut.pt").write_bytes(flipped)
    with pytest.raises(ModelError, match="Bad CRC-32"):
        read_pickle(tmp_path / "cut.pt")


def test_the_reader_is_bounded_and_needs_no_torch(tmp_path, monkeypatch):
    """R31: pickles are read by a process of its own, whose memory and time are bounded; its end is told in one line."""
    file = tmp_path / "weights.pt"
    file.write_bytes(zipped(state(a=tensor()), NUMBERS))
    seen = "import json, resource, sys; from sft_jax.weights import pickles; pickles.write_tensors = lambda *a: None; "
    seen += "pickles.main(); assert 'torch' not in sys.modules and 'jax' not in sys.modules; "
    seen += "print(resource.getrlimit(resource.RLIMIT_AS)[0], resource.getrlimit(resource.RLIMIT_CPU)[0])"
    asked = json.dumps({"files": {str(file): None}, "out": str(tmp_path)})
    done = subprocess.run([sys.executable, "-c", seen], input=asked, capture_output=True, text=True, check=True)
    size = file.stat().st_size
    assert done.stdout == f'{{"notes": []}}{pickles.MEMORY + 4 * size} {pickles.SECONDS}\n'
    monkeypatch.setattr(converting, "READER", "import os, signal; os.kill(os.getpid(), signal.SIGXCPU)")
    assert "reading it was stopped with -24" in refusal(file, tmp_path)
    monkeypatch.setattr(converting, "READER", "raise MemoryError('too much')")
    assert "(MemoryError: too much); it is broken, or too large" in refusal(file, tmp_path)


def test_predict_after_convert(source, tmp_path):
    """C6: a converted classifier predicts as the same weights in safetensors do."""
    config = json.loads((source / "config.json").read_text())
    config |= {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "no", "1": "yes"}}
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "out")
    save_file(load_file(tmp_path / "expected.safetensors"), source / "model.safetensors")
    one, other = (list(load_predictor(str(home))(["bara cela"], raw=True)) for home in (source, tmp_path / "out"))
    assert one == other


def test_the_command(tmp_path):
    """R31: `sft-jax convert` says what it made, and what it left out; where it refuses, one message and code 65."""
    file = tmp_path / "weights.pt"
    file.write_bytes(zipped(state(a=tensor(), epoch=number(3)), NUMBERS))

    def command(*words: object) -> tuple[int, str, str]:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        line = [sys.executable, "-m", "sft_jax", "convert", *map(str, words)]
        done = subprocess.run(line, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    code, out, err = command(file, tmp_path / "out")
    assert (code, err) == (0, "") and "left out: 'epoch', which is no tensor\n" in out
    assert out.endswith(
        f"{file} is in {tmp_path / 'out'} as safetensors; use it with model.source={tmp_path / 'out'}\n"
    )
    assert (load_file(tmp_path / "out" / "model.safetensors")["a"] == np.arange(6).reshape(2, 3)).all()
    file.write_bytes(zipped(pickle.dumps({"a": Payload(os.system, "true")}, protocol=2)))
    code, out, err = command(file, tmp_path / "other")
    assert (code, out) == (65, "") and err.startswith(f"{file}: names 'posix.system'") and err.count("\n") == 1
    assert not (tmp_path / "other").exists()
