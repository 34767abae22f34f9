"""The run directory: what is in it, and whether a run may go on in it.

run.lock        who trains in it, while it is locked
config.yaml     the whole configuration, defaults included
manifest.json   what the result depends on, and the processes that worked on it; see `manifest.py`
data.json       the data report: what became of the rows, and what they are in tokens
metrics.jsonl   a line for each interval and evaluation
ledger.jsonl    where the wall time went
events/         the same for TensorBoard
checkpoints/    training states, and those that were moved aside
model/          the best model as a Hugging Face directory
summary.json    scores and seconds, when the run is done
review.json     how the rows of the test split were answered, in short
report.html     all of this for people
"""

import errno
import fcntl
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from sft_jax.config.read import parse_value, write_config
from sft_jax.config.schema import Config
from sft_jax.errors import NO_ROOM, RunError, SftError, listing
from sft_jax.train.manifest import command, utc_now

# Keys that change how a run goes but not what it computes, so that a resumed run may differ in them.
FREE = ("run", "mesh", "data.prefetch", "data.workers", "data.cache", "train.log_every", "train.scan",
        "train.remat", "eval.baselines",
        "checkpoint.keep", "checkpoint.on_error", "report")  # fmt: skip
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of a file system that has none


def is_used(directory: Path) -> bool:
    """Whether a run began here."""
    return (directory / "config.yaml").is_file()


def check(config: Config, directory: Path) -> None:
    """Refuse a directory that this run may not go on in; says why, and what to do."""
    if directory.exists() and not directory.is_dir():
        raise RunError(f"{directory}: is a file; give another run.dir")
    if config.run.resume == "never" and is_used(directory):
        raise RunError(f"{directory}: holds a run, and run.resume is never; give another run.dir")
    if config.run.resume == "must" and not is_used(directory):
        raise RunError(f"{directory}: holds no run, and run.resume is must; check run.dir")
    if (directory / "checkpoints").exists() and not (directory / "checkpoints").is_dir():
        raise RunError(f"{directory / 'checkpoints'}: is a file; move it away, or give another run.dir")
    if not is_used(directory):
        return
    before = _read(directory / "config.yaml", parse_value)
    changed = differences(before, parse_value(write_config(config)))
    differing = [f"{key}: {there!r} there, {now!r} now" for key, (there, now) in changed.items() if not _is_free(key)]
    if differing:
        where = f"{directory} holds another run; give another run.dir, or the same settings"
        raise RunError(listing(where, differing))


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Create the directory and keep other runs out of it; who is killed lets go of it by that.

    On a file system that has no locks, nobody is kept out.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o750)
        lock = open(directory / "run.lock", "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise RunError(f"{directory}: cannot be written ({error.strerror}); give another run.dir") from None
    with lock:
        _take(lock, directory)
        try:
            yield
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            where = error.filename or directory
            raise RunError(f"{where}: {error.strerror}; make room, and the same command goes on") from None


def begin(config: Config, directory: Path, manifest: Mapping[str, Any]) -> None:
    """Write down what run this is, or check that it is the one that began here, with the same data and weights."""
    if not is_used(directory):
        directory.mkdir(parents=True, exist_ok=True, mode=0o750)
        write_json(directory / "manifest.json", manifest)
        write_whole(directory / "config.yaml", write_config(config))
        return
    check(config, directory)  # again: another run may have begun since
    before = _read(directory / "manifest.json", json.loads)
    differing = [
        f"{what}: not what the run began with" for what in ("data", "weights") if before.get(what) != manifest[what]
    ]
    if differing:
        raise RunError(listing(f"{directory}: cannot go on; give another run.dir", differing))


@contextmanager
def attempt(directory: Path, now: Mapping[str, Any]) -> Iterator[None]:
    """Write into the manifest that a process works on the run and what is not as it was, then how that ended."""
    file = directory / "manifest.json"
    then = _read(file, json.loads)
    earlier = then.pop("attempts", [])
    changed = differences(then, {key: value for key, value in now.items() if key != "attempts"})
    mine: dict[str, Any] = {
        "command": command(sys.argv),
        "started": utc_now(),
        "finished": None,
        "exit_code": None,
        "differs": {key: list(values) for key, values in changed.items()},
    }
    write_json(file, {**then, "attempts": [*earlier, mine]})
    try:
        yield
        mine["exit_code"] = 0
    except BaseException as error:
        mine["exit_code"] = error.exit_code if isinstance(error, SftError) else 1
        raise
    finally:
        mine["finished"] = utc_now()
        write_json(file, {**then, "attempts": [*earlier, mine]})


def settings(config: Config) -> dict[str, Any]:
    """The flattened settings that change what is computed, without the seeds."""
    tree = flatten(parse_value(write_config(config)))
    return {key: value for key, value in tree.items() if not _is_free(key) and not key.startswith("seed.")}


def write_json(file: Path, content: Any, *, sort: bool = True) -> None:
    """Write plain data as a JSON file, keys in the order of the alphabet or as they stand."""
    write_whole(file, json.dumps(content, indent=2, sort_keys=sort) + "\n")


def write_whole(file: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    fresh = file.with_name(f".{file.name}.new")
    fresh.write_text(text, encoding="utf-8")
    fresh.rename(file)


def differences(*trees: Any) -> dict[str, tuple[Any, ...]]:
    """Dotted key -> its value in each tree, for the keys in which they differ; None where a tree lacks the key."""
    flat = [{key: value for key, value in flatten(tree).items() if value != {}} for tree in trees]
    values = {key: tuple(tree.get(key) for tree in flat) for key in sorted(set().union(*flat))}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested keys in dotted form; lists are values."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    joined = (flatten(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in tree.items())
    return {key: value for part in joined for key, value in part.items()}


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def _take(lock: Any, directory: Path) -> None:
    """Lock the file and write into it who holds it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        raise RunError(f"{directory}: {holder} is training in it; wait, stop it, or give another run.dir") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')},\n")
    lock.flush()


def _read(file: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """A file that a run wrote when it began."""
    try:
        found = parse(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{file}: cannot be read ({error.strerror}); give another run.dir") from None
    except (ValueError, yaml.YAMLError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise RunError(f"{file}: is damaged; put it back from a copy, or give another run.dir")
    return found
