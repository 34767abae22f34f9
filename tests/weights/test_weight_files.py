"""Checkpoint directories: what we write reads back, over one file or many; what is broken is said to be."""

import json
import os
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sft_jax.errors import ModelError
from sft_jax.weights.files import count, open_checkpoint, read_config, write_checkpoint

INDEX = "model.safetensors.index.json"


def some_tensors() -> dict[str, np.ndarray]:
    """Tensors of several sizes, one of them empty of axes."""
    draw = np.random.default_rng(0)
    shapes = {"a.weight": (7, 5), "b.weight": (64, 9), "b.bias": (9,), "scalar": (), "z": (3, 2, 2)}
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def same(directory, tensors) -> bool:
    """Whether a directory holds exactly these tensors, byte by byte."""
    checkpoint = open_checkpoint(directory)
    found = {name: checkpoint.read(name) for name in checkpoint.shapes}
    assert found.keys() == tensors.keys()
    assert checkpoint.shapes == {name: tensor.shape for name, tensor in tensors.items()}
    return all(found[n].dtype == tensors[n].dtype and found[n].tobytes() == tensors[n].tobytes() for n in tensors)


@pytest.mark.parametrize("shard_bytes", [1, 100, 200, 2500, 10**9])
def test_what_is_written_reads_back(shard_bytes, tmp_path):
    """R57: over one file or many, every tensor is byte-equal, each is in one file, and no file is too large."""
    tensors = some_tensors()
    write_checkpoint(tmp_path, {"model_type": "bert", "naïve": "é"}, tensors, shard_bytes)
    assert same(tmp_path, tensors)
    assert not same(tmp_path, {**tensors, "z": -tensors["z"]})
    assert read_config(tmp_path) == {"model_type": "bert", "naïve": "é"}
    files = sorted(tmp_path.glob("*.safetensors"))
    if shard_bytes > 10**6:
        assert [f.name for f in files] == ["model.safetensors"] and not (tmp_path / INDEX).exists()
        return
    inside = [load_file(file) for file in files]
    assert sum(map(len, inside)) == len(tensors) and len(files) > 1
    for held in inside:
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= shard_bytes
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"] == {name: file.name for file, held in zip(files, inside, strict=True) for name in held}
    assert [f.name for f in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    """R54: written twice, in another order, the files are byte-identical; another number changes the digest."""
    tensors = some_tensors()
    write_checkpoint(tmp_path / "a", {"x": 1, "y": 2}, tensors)
    write_checkpoint(tmp_path / "b", {"y": 2, "x": 1}, dict(reversed(tensors.items())))
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    write_checkpoint(tmp_path / "c", {}, {**tensors, "scalar": np.zeros((), np.float32)})
    digests = [open_checkpoint(tmp_path / name).digest() for name in "abc"]
    assert digests[0] == digests[1] != digests[2]


def test_opening_reads_headers_alone(tmp_path):
    """R30: a directory is opened by its headers; the numbers are read when they are asked for."""
    write_checkpoint(tmp_path, {}, some_tensors())
    checkpoint = open_checkpoint(tmp_path)
    assert count(checkpoint.shapes) == sum(t.size for t in some_tensors().values())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError):
        checkpoint.read("z")


def test_shards_may_be_links_as_in_the_cache_of_the_hub(tmp_path):
    """R32: the hub's cache keeps each file as a link to a blob beside the snapshot, and that reads as ever."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    write_checkpoint(snapshot, {}, some_tensors(), 200)
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(os.path.join("..", "..", "blobs", str(number)))
    assert same(snapshot, some_tensors())


def test_a_quantised_checkpoint_is_refused(tmp_path):
    """C26: a quantised checkpoint is refused by its `config.json`, or by the type of its tensors."""
    write_checkpoint(tmp_path, {"quantization_config": {"bits": 4}}, some_tensors())
    with pytest.raises(ModelError, match="a quantised checkpoint; give the original, unquantised one"):
        open_checkpoint(tmp_path)
    write_checkpoint(tmp_path, {}, {"a": np.zeros(4, np.int8)})
    with pytest.raises(ModelError, match="a has type I8, not one of F32, F16, BF16, F64"):
        open_checkpoint(tmp_path).read("a")
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(ModelError, match="a has type F8_E4M3"):
        open_checkpoint(tmp_path).read("a")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("{", "not JSON"),
        ("[1, 2]", "holds a list, expected an object"),
        ("[" * 100_000, "not JSON"),
        ("\xff", "not JSON"),
    ],
)
def test_a_broken_configuration_is_named(content, said, tmp_path):
    """R33: a missing, broken or bottomless `config.json` is an error of one line."""
    save_file(some_tensors(), tmp_path / "model.safetensors")
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode("latin1"))
    with pytest.raises(ModelError) as error:
        open_checkpoint(tmp_path)
    assert said in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_directory_without_weights(tmp_path):
    """R32: a directory that holds no weights says which file is looked for."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"no model\.safetensors and no model\.safetensors\.index\.json"):
        open_checkpoint(tmp_path)
