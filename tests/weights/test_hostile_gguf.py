"""GGUF files that mean harm: cut, broken, with counts beyond all bounds. One line is said, and little is allocated."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_gguf import write_gguf

from sft_jax.data.text import load_tokenizer
from sft_jax.errors import ModelError
from sft_jax.gguf import MOST_KEYS, MOST_TENSORS, read_header
from sft_jax.weights.files import open_checkpoint

HUGE = (1 << 32, 1 << 48, (1 << 63) - 1, (1 << 64) - 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """A sound file."""
    file = tmp_path_factory.mktemp("whole") / "model.gguf"
    write_gguf(file)
    return file.read_bytes()


def read_all(file: Path) -> int:
    """Everything of a file: its tensors and its tokenizer."""
    checkpoint = open_checkpoint(file)
    load_tokenizer(file)
    return sum(checkpoint.read(name).size for name in checkpoint.shapes)


def message(file: Path, content: bytes) -> str:
    """What reading a file of this content ends with, which is one line that names it."""
    file.write_bytes(content)
    with pytest.raises(ModelError) as error:
        read_all(file)
    assert str(error.value).startswith(f"{file}: ") and len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_a_file_cut_anywhere_is_refused(whole, tmp_path):
    """R32: a file that was cut at any byte is an error of ours that names it; the whole file is read."""
    (tmp_path / "model.gguf").write_bytes(whole)
    assert read_all(tmp_path / "model.gguf")
    end = len(whole) - sum(tensor.size for tensor in read_header(tmp_path / "model.gguf").tensors.values())
    for length in [*range(0, end, 23), *range(end, len(whole), 2003), len(whole) - 1]:
        assert "not a whole GGUF file" in message(tmp_path / "model.gguf", whole[:length])


@given(data=st.data())
@settings(
    max_examples=150,
    deadline=2000,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_broken_bytes_never_end_in_another_error(data, whole, tmp_path_factory):
    """R32: whatever bytes of the header are changed, the file is read or refused, with no other kind of error."""
    file = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 9000))] = data.draw(st.integers(0, 255))
    file.write_bytes(bytes(content))
    try:
        read_all(file)
    except ModelError as error:
        assert str(error).startswith(str(file))


def text(value: str) -> bytes:
    """A text as the format has it."""
    return struct.pack("<Q", len(value)) + value.encode()


def header(keys: int, tensors: int, rest: bytes, version: int = 3) -> bytes:
    """A file with these counts, and what follows them."""
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest + b"\0" * 64


def tensor(shape: tuple[int, ...], kind: int = 0, begin: int = 0) -> bytes:
    """The entry of a tensor called `a`."""
    sizes = b"".join(struct.pack("<Q", size) for size in shape)
    return text("a") + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, begin)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it ends at byte 0"),
        (b"PK\x03\x04" + b"\0" * 60, "it does not begin with GGUF"),
        (header(0, 0, b"", version=1), "version 1, expected one of 2, 3"),
        (header(0, 0, b"", version=3 << 24), "version 50331648"),
        *((header(count, 0, b""), f"{count} keys, more than {MOST_KEYS}") for count in HUGE),
        *((header(0, count, b""), f"{count} tensors, more than {MOST_TENSORS}") for count in HUGE),
        *((header(1, 0, struct.pack("<Q", count)), f"a text of {count} bytes") for count in HUGE),
        *((header(1, 0, text("k") + struct.pack("<IIQ", 9, 8, count)), f"{count} texts in a list") for count in HUGE),
        *((header(1, 0, text("k") + struct.pack("<IIQ", 9, 12, count)), "were to follow byte") for count in HUGE),
        (header(1, 0, text("k") + struct.pack("<IQ", 8, 1 << 40)), "a text of 1099511627776 bytes"),
        (header(1, 0, text("k") + struct.pack("<IIQ", 9, 9, 1)), "a list of values of type 9"),
        (header(1, 0, text("k") + struct.pack("<I", 13)), "a value of type 13"),
        (header(1, 0, struct.pack("<Q", 1) + b"\xff"), "is not UTF-8"),
        (header(2, 0, (text("k") + struct.pack("<II", 4, 1)) * 2), "key 'k' is there twice"),
        (header(1, 0, text("general.alignment") + struct.pack("<II", 4, 0)), "general.alignment is no power of two"),
        (header(1, 0, text("general.alignment") + struct.pack("<II", 4, 24)), "general.alignment is no power of two"),
        (header(0, 2, tensor((2,)) * 2), "tensor 'a' is there twice"),
        (header(0, 1, tensor((2,), kind=99)), "a tensor of type 99"),
        (header(0, 1, tensor((33,), kind=2)), "a tensor with rows of 33 numbers in blocks of 32"),
        (header(0, 1, tensor((0, 1 << 63))), "a tensor without numbers"),
        (header(0, 1, tensor(())), "a tensor of 0 dimensions"),
        (header(0, 1, tensor((1,) * 5)), "a tensor of 5 dimensions"),
        *((header(0, 1, tensor((size, size))), "the file at") for size in HUGE),
        *((header(0, 1, tensor((2,), begin=begin)), "the file at") for begin in HUGE),
    ],
)  # fmt: skip
def test_malformed_headers_are_refused(content, said, tmp_path):
    """R32: counts and sizes beyond the file, unknown types and names that stand twice end in one line."""
    assert said in message(tmp_path / "model.gguf", content)


BOMBS = {  # with 2 GiB of zeros behind each
    "texts": header(1, 0, text("k") + struct.pack("<IIQ", 9, 8, 1 << 27)),
    "text": header(1, 0, text("k") + struct.pack("<IQ", 8, 3 << 29)),
    "numbers": header(1, 0, text("k") + struct.pack("<IIQ", 9, 0, 3 << 29)),
    "terabytes": header(0, 1, tensor((1 << 20, 1 << 20))),
}
BOUNDED = """
import json, resource, sys
from pathlib import Path
from sft_jax.weights.files import open_checkpoint
from sft_jax.errors import ModelError
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
for file in json.loads(sys.argv[1]):
    try:
        open_checkpoint(Path(file))
    except ModelError as error:
        print(error)
"""


def test_little_memory_is_needed_to_refuse(tmp_path):
    """R32: files that speak of terabytes, or hold millions of empty texts, are refused within 1 GiB of addresses."""
    files = []
    for name, content in BOMBS.items():
        files.append(tmp_path / f"{name}.gguf")
        with open(files[-1], "wb") as sparse:
            sparse.write(content)
            sparse.truncate(1 << 31)
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED, json.dumps([str(file) for file in files])], capture_output=True, text=True
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) == len(BOMBS), done.stderr
    assert all("not a whole GGUF file" in line for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "llama"}, "a tokenizer of kind 'llama'; only 'gpt2', which is byte-level BPE, is read"),
        ({"model": None}, "a tokenizer of kind None"),
        (
            {"pre": "qwen35"},
            "a tokenizer that splits texts as 'qwen35' is not read; did you mean 'qwen2'? (known: gpt-2",
        ),
        ({"pre": None}, "a tokenizer that splits texts as None is not read"),
        ({"pre": 7}, "a tokenizer that splits texts as 7"),
        ({"tokens": None}, "its tokenizer has no list of tokens with the kind of each"),
        ({"tokens": 5}, "its tokenizer has no list of tokens with the kind of each"),
        ({"token_type": [1, 2]}, "its tokenizer has no list of tokens with the kind of each"),
        ({"merges": None}, "its tokenizer has a token twice, or merges that are no pairs"),
        ({"merges": ["a b c"]}, "its tokenizer has a token twice, or merges that are no pairs"),
        ({"merges": ["h zz"]}, "its tokenizer cannot be built (Error while initializing BPE: Token `zz`"),
        ({"eos_token_id": 9999}, "tokenizer.ggml.eos_token_id is 9999, of 266 tokens"),
        ({"bos_token_id": "a"}, "tokenizer.ggml.bos_token_id is 'a'"),
    ],
)
def test_tokenizers_that_are_not_understood(changes, said, tmp_path):
    """R32: a tokenizer of another kind, or one that contradicts itself, is refused by name."""
    write_gguf(tmp_path / "model.gguf", tokenizer=changes)
    with pytest.raises(ModelError) as error:
        load_tokenizer(tmp_path / "model.gguf")
    assert said in str(error.value) and len(str(error.value).splitlines()) == 1
