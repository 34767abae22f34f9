"""The cache of tokens: found by all that they depend on and by nothing else, whole or not at all, and bounded."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash
from conftest import write_tokenizer

from sft_jax import run
from sft_jax.data import cache, text
from sft_jax.data.cache import INDEX, key, load, store
from sft_jax.data.text import TextTokenizer, load_tokenizer, tokenize
from sft_jax.errors import DataError

TEXTS = ["bara bare bari", "cela", "doro dora unknown", "漢字"]
PAIRS = ["fena", "gula guli gulo", "hina", "jata"]
ROWS = {"ids": np.arange(1000, dtype=np.int32), "offsets": np.array([0, 3, 1000])}


@pytest.fixture
def tokenizer(tmp_path) -> TextTokenizer:
    """The tokenizer of these tests."""
    write_tokenizer(tmp_path)
    return load_tokenizer(tmp_path)


@pytest.fixture
def home(tmp_path) -> Path:
    """A cache of the test's own."""
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """How many texts were really tokenised, each time that any were."""
    found: list[int] = []
    real = text._tokenized

    def counted(tokenizer, columns, sink):
        found.append(len(columns[0]))
        real(tokenizer, columns, sink)

    monkeypatch.setattr(text, "_tokenized", counted)
    return found


def equal(one, other) -> bool:
    """Whether two results of tokenisation are the same to the last bit."""
    fields = one.fields.keys() == other.fields.keys() and all(
        one.fields[name].dtype == other.fields[name].dtype and np.array_equal(one.fields[name], other.fields[name])
        for name in one.fields
    )
    return fields and np.array_equal(one.offsets, other.offsets) and one.truncated == other.truncated


@pytest.mark.parametrize("pairs", [None, PAIRS], ids=["texts", "pairs"])
def test_what_is_found_is_what_was_made(pairs, tokenizer, home, made):
    """C22: the second time nothing is tokenised, and tokens, offsets and the count of cut documents are the same."""
    plain = tokenize(tokenizer, TEXTS, pairs, 4)
    cached = replace(tokenizer, home=home)
    assert equal(tokenize(cached, TEXTS, pairs, 4), plain) and equal(tokenize(cached, TEXTS, pairs, 4), plain)
    assert made == [4, 4] and plain.truncated


def test_misses(tokenizer, tmp_path, home, made, monkeypatch):
    """C22: another length, pair, text, order of texts, tokenizer or version of the code is another entry."""
    cached = replace(tokenizer, home=home)
    tokenize(cached, TEXTS, None, 8)
    spelling = tmp_path / "tokenizer.json"
    spelling.write_text(spelling.read_text().replace('"bara"', '"para"'))
    others = [
        lambda: tokenize(cached, TEXTS, None, 9),
        lambda: tokenize(cached, TEXTS, PAIRS, 8),
        lambda: tokenize(cached, PAIRS, TEXTS, 8),
        lambda: tokenize(cached, [*TEXTS, *PAIRS], None, 8),
        lambda: tokenize(cached, [*TEXTS[:3], "漢"], None, 8),
        lambda: tokenize(cached, TEXTS[::-1], None, 8),
        lambda: tokenize(cached, ["bara bare bar", "icela", *TEXTS[2:]], None, 8),
        lambda: tokenize(replace(load_tokenizer(tmp_path), home=home), TEXTS, None, 8),
    ]
    for number, other in enumerate(others):
        other()
        assert len(made) == number + 2
    for name, where in (("VERSION", text), ("__version__", text.tokenizers)):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, "another")
            before = len(made)
            tokenize(cached, TEXTS, None, 8)
            assert len(made) == before + 1, name
    before = len(made)
    for other in others:
        other()
    assert len(made) == before, "and all of them are kept beside each other"


@pytest.mark.parametrize(
    ("change", "hit"),
    [
        ("data.max_length=16", False),
        ("task.text_pair=label", False),
        ("data.clean={html: true, whitespace: true}", False),
        ("data.max_rows=20", False),
        ("data.prefetch=1", True),
        ("train.batch_size=4", True),
        ("seed=5", True),
        ("data.layout.kind=padded", True),
        ("data.augment.swap=0.5", True),
        ("train.epochs=1", True),
    ],
)
def test_runs_hit_and_miss(change, hit, configure, tmp_path, made, monkeypatch):
    """C22: runs of one recipe find each other's tokens, unless a setting changes the texts or their tokens."""
    monkeypatch.setenv("SFT_JAX_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "rows.csv"
    lines = ["text,label", *(f"<b>bara</b> bare {word},{'ab'[n % 2]}" for n, word in enumerate(TEXTS * 6))]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    source = [f"data.source.{split}={file}" for split in ("train", "validation", "test")]
    first = run.prepare(configure(*source))
    assert len(made) == 1, "three equal splits are one entry"
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    second = run.prepare(configure(*source, change))
    assert (len(made) == 1) == hit
    assert (
        not hit or second.data["train"].tokens["input_ids"].tolist() == first.data["train"].tokens["input_ids"].tolist()
    )


def test_without_a_cache_nothing_is_read_or_written(configure, tmp_path, made, monkeypatch):
    """C26: `data.cache: false` tokenises each time, and leaves the cache alone."""
    monkeypatch.setenv("SFT_JAX_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        run.prepare(configure("data.cache=false"))
    assert len(made) == 6 and not (tmp_path / "cache").exists()
    run.prepare(configure())
    entries = list((tmp_path / "cache" / "tokens").iterdir())
    assert len(entries) == 3
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "cache" / "tokens", *entries)), "private"


def test_nothing_is_forked(tokenizer, home, monkeypatch):
    """C22: texts are tokenised by threads: a process that runs JAX would not survive a fork."""
    begun = []
    monkeypatch.setattr(os, "fork", lambda: begun.append("fork"))
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", lambda self: begun.append("process"))
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: begun.append("command"))
    found = tokenize(replace(tokenizer, home=home), TEXTS * 500, None, 8)
    assert len(found.offsets) == 2001 and begun == []
    os.fork()
    assert begun == ["fork"], "control: a fork would have been seen"


# Damage.


@pytest.mark.parametrize("file", [INDEX, "0", "2"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_a_damaged_entry_is_written_anew(file, damage, tokenizer, home, made):
    """C22: an entry with a flipped byte, cut short, emptied or lost is no find, and the next run finds it mended."""
    cached = replace(tokenizer, home=home)
    plain = tokenize(cached, TEXTS, None, 8)
    (entry,) = home.iterdir()
    content = (entry / file).read_bytes()
    middle = len(content) // 2
    if damage == "gone":
        (entry / file).unlink()
    else:
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        (entry / file).write_bytes({"flip": flipped, "cut": content[:middle], "empty": b""}[damage])
    assert equal(tokenize(cached, TEXTS, None, 8), plain) and len(made) == 2
    assert equal(tokenize(cached, TEXTS, None, 8), plain) and len(made) == 2
    assert [found.name for found in home.iterdir()] == [entry.name], "and nothing else is left"


def test_pickles_are_not_opened(home, tmp_path):
    """R33: an entry whose arrays would run code when opened, checksum and all, is no find, and nothing runs."""

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    store(home, "name", ROWS)
    content = np.array([Evil()], dtype=object).dumps()
    (home / "name" / "0").write_bytes(content)
    for dtype, shape in (("|O", [len(content) // 8]), ("|u1", [len(content)])):
        index = {"ids": {"dtype": dtype, "shape": shape, "file": "0", "xxh3_128": xxhash.xxh3_128_hexdigest(content)}}
        said = json.dumps(index).encode()
        (home / "name" / INDEX).write_bytes(xxhash.xxh3_128_hexdigest(said).encode() + b"\n" + said)
        found = load(home, "name")
        assert (found is None) == (dtype == "|O"), "control: the same as bytes is found"
    assert not (tmp_path / "ran").exists()


KILLED = """
    import json, os, shutil, signal, sys
    from pathlib import Path
    import numpy as np
    from sft_jax.data import cache

    home, rows = Path(sys.argv[1]), {"ids": np.arange(1000, dtype=np.int32)}

    def killed_at(stop):
        # The exit status of a child that is killed at this line of the cache's code while it writes.
        count = 0

        def trace(frame, event, arg):
            nonlocal count
            name = frame.f_code.co_qualname
            if frame.f_code.co_filename != cache.__file__ or name.startswith(("Sink", "_Growing", "_mapped", "chunks")):
                return None  # what grows is beside the entries
            count += event == "line"
            if event == "line" and count == stop:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        child = os.fork()
        if child == 0:
            sys.settrace(trace)
            cache.store(home, "name", rows)
            os._exit(0)
        return os.waitpid(child, 0)[1]

    for damaged in (False, True):
        status, line = signal.SIGKILL, 0
        while status == signal.SIGKILL:
            line += 1
            shutil.rmtree(home, ignore_errors=True)
            if damaged:  # an entry to be replaced
                cache.store(home, "name", rows)
                (home / "name" / cache.INDEX).write_text("another")
            status, found = killed_at(line), cache.load(home, "name")
            whole = found is not None and np.array_equal(found["ids"], rows["ids"])
            cache.store(home, "name", rows)
            again = cache.load(home, "name") is not None
            print(json.dumps([damaged, line, status, found is None, whole, again]))
"""


def test_a_kill_at_any_line_leaves_a_whole_entry_or_none(home):
    """C22: a process that is killed at each line in turn leaves a whole entry or none, and the next mends it."""
    script = [sys.executable, "-c", textwrap.dedent(KILLED), str(home)]
    done = subprocess.run(script, capture_output=True, text=True, check=True, timeout=120)
    seen = [json.loads(line) for line in done.stdout.splitlines()]
    for damaged in (False, True):
        killed = [row for row in seen if row[0] == damaged]
        assert [row[2] for row in killed] == [signal.SIGKILL] * (len(killed) - 1) + [0] and len(killed) > 25
        assert all(none != whole for _, _, _, none, whole, _ in killed), "neither half of an entry, nor another one"
        assert {row[3] for row in killed} == {False, True} and all(row[5] for row in killed)


def test_what_was_left_half_written_is_swept_away(home):
    """C22: what a killed process left is removed once it is a day old, and not before: another may be writing it."""
    for name, age in ((".old", 25), (".new", 1)):
        (home / name / "name").mkdir(parents=True)
        (home / f"{name}.lock").touch()
        for left in (home / name, home / f"{name}.lock"):
            then = left.stat().st_mtime - 3600 * age
            os.utime(left, (then, then))
    store(home, "name", ROWS)
    assert sorted(found.name for found in home.iterdir()) == [".new", ".new.lock", "name"]


SHARED = """
    import os, sys, time
    from pathlib import Path
    import numpy as np
    from sft_jax.data import cache

    home, log, killed = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "killed"

    def make(sink):
        with open(log, "a") as file:
            file.write("made ")
        sink.add("ids", np.arange(1 << 20, dtype=np.int32))
        print("making", flush=True)
        sys.stdin.readline()
        sink.add("ids", np.arange(1 << 20, dtype=np.int32))

    found = cache.made(home, lambda: ["rows"], make)
    print(int(found["ids"].sum()), flush=True)
"""


@pytest.mark.parametrize("end", ["made", "killed"])
def test_processes_share_an_entry(end, home, tmp_path):
    """Issue 14: of two processes one makes an entry and the other waits, and makes it if the first is killed."""
    script = [sys.executable, "-c", textwrap.dedent(SHARED), str(home), str(tmp_path / "log"), end]
    begun = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(script, **begun) as one:
        assert one.stdout.readline() == "making\n"
        with subprocess.Popen(script, **begun) as two:
            with pytest.raises(subprocess.TimeoutExpired):
                two.wait(1.5)
            if end == "killed":
                one.kill()
                assert two.stdout.readline() == "making\n"
                assert two.communicate("go\n", timeout=60)[0] == f"{sum(range(1 << 20)) * 2}\n"
            else:
                said = one.communicate("go\n", timeout=60)[0], two.communicate(timeout=60)[0]
                assert said == (f"{sum(range(1 << 20)) * 2}\n",) * 2
    assert (tmp_path / "log").read_text() == ("made made " if end == "killed" else "made ")
    assert len(list(home.glob("[!.]*"))) == 1 and not list(home.glob("*.lock"))


def test_the_cache_of_someone_else_is_read(tokenizer, home, made, monkeypatch):
    """Issue 14: what may be read and not be written is found all the same."""
    cached = replace(tokenizer, home=home)
    plain = tokenize(cached, TEXTS, None, 8)
    for name in ("utime", "rename", "mkdir", "open"):
        monkeypatch.setattr(os, name, full)
    assert equal(tokenize(cached, TEXTS, None, 8), plain) and made == [4]
    assert (
        equal(tokenize(cached, PAIRS, None, 8), tokenize(tokenizer, PAIRS, None, 8)) and len(list(home.iterdir())) == 1
    )


@pytest.mark.parametrize("in_memory", [0, 1 << 26])
def test_arrays_in_blocks_are_those_at_once(in_memory, home, monkeypatch):
    """Issue 14: blocks of any sizes make the same array, in memory, on disk, kept or not, whatever its type."""
    monkeypatch.setattr(cache, "IN_MEMORY", in_memory)
    monkeypatch.setattr(cache, "MAPPED", 100)
    draw = np.random.default_rng(0)
    given = {
        "numbers": draw.integers(0, 9, 1000, np.int32),
        "alike": np.full(1000, 7, np.int16),
        "late": np.append(np.zeros(999), -0.0),
        "nan": np.full(1000, np.nan, np.float32),
        "wide": draw.random((1000, 3)),
        "flags": draw.random(1000) < 0.5,
        "none": np.zeros(0, np.int8),
    }
    for number, size in enumerate((1, 7, 1000)):

        def make(sink, size=size):
            for name, array in given.items():
                for begin in range(0, max(1, len(array)), size):
                    sink.add(name, array[begin : begin + size])

        for place in (None, home):
            found = cache.made(place, lambda number=number: [str(number)], make)
            again = cache.made(place, lambda number=number: [str(number)], make)
            for name, array in given.items():
                assert all(
                    a.dtype == array.dtype and a.tobytes() == array.tobytes() for a in (found[name], again[name])
                )
    sizes = json.loads((next(home.iterdir()) / INDEX).read_bytes().partition(b"\n")[2])
    assert "alike" in sizes["alike"] and "alike" in sizes["nan"] and "file" in sizes["late"]


def test_an_array_in_a_file_takes_no_memory(home, monkeypatch):
    """Issue 14: making and reading an array of 64 MB takes a fraction of that, in a cache and without one."""
    monkeypatch.setattr(cache, "IN_MEMORY", cache.CHUNK)
    for place in (None, home, home):
        tracemalloc.start()
        found = cache.made(
            place, lambda: ["rows"], lambda sink: [sink.add("ids", np.arange(4096)) for _ in range(2048)]
        )
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < 1.5 * cache.CHUNK and found["ids"].nbytes == 1 << 26 and found["ids"][-1] == 4095


def test_a_cache_does_not_grow_without_bound(home):
    """C22: the entries that were longest not used make way, and what was used just now stays."""
    store(home, "size", ROWS)
    size = sum(file.stat().st_size for file in (home / "size").iterdir())
    for number in range(4):
        store(home, str(number), ROWS)
    for age, name in enumerate(("3", "size", "1", "2", "0")):  # the newest first
        os.utime(home / name, (10**9 - age, 10**9 - age))
    assert load(home, "0") is not None, "which counts as a use"
    store(home, "last", ROWS, most_bytes=4 * size)
    assert sorted(found.name for found in home.iterdir()) == ["0", "3", "last", "size"]
    store(home, "none", ROWS, most_bytes=size - 1)
    assert list(home.iterdir()) == [], "what is larger than all there may be is not kept"


def test_a_cache_that_cannot_be_written_is_done_without(tokenizer, tmp_path, made, monkeypatch):
    """C22: a file in the way, a full disk or a directory of someone else's costs time and nothing else."""
    (tmp_path / "file").touch()
    cached = replace(tokenizer, home=tmp_path / "file" / "tokens")
    assert equal(tokenize(cached, TEXTS, None, 8), tokenize(tokenizer, TEXTS, None, 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache._Growing, "spill", full)
        tokenize(replace(tokenizer, home=tmp_path / "tokens"), TEXTS, None, 8)
        monkeypatch.setattr(cache, "IN_MEMORY", 100)
        with pytest.raises(DataError, match=r"written there \(.*No space left on device\); make room"):
            tokenize(tokenizer, TEXTS * 20, None, 8)
    assert list((tmp_path / "tokens").iterdir()) == [], "and what was begun is taken away"


def full(*given, **more):
    """A disk without room."""
    raise OSError(28, "No space left on device")


def test_parts_of_a_key_are_told_apart():
    """C22: where one part ends and the next begins is part of the key."""
    assert len({key(parts) for parts in (["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""], ["", "abc"])}) == 5
    assert key(["é"]) == key(["é".encode()]) and cache.MOST_BYTES == 20e9
