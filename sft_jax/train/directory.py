"""The run directory: what is in it, and whether a run may go on in it.

run.lock        who trains in it, while it is locked
config.yaml     the whole configuration, defaults included
manifest.json   what the result depends on, and the processes that worked on it; see `manifest.py`
data.json       the data report: what became of the rows, and what they are in tokens
metrics.jsonl   a line for each interval and evaluation
samples.jsonl   of a model that answers in words, what it answered at each validation
ledger.jsonl    where the wall time went
grid.json       of `train.head_grid`, what each point came to
events/         the same as metrics.jsonl for TensorBoard
profile/        of `train.profile`, the trace
checkpoints/    training states, and those that were moved aside
model/          the best model as a Hugging Face directory
adapter/        of a run with adapters, the best one as `peft` loads it
summary.json    scores and seconds, when the run is done
predictions.jsonl  a line for each row of the test split: where it stands, its truth, what was predicted
review.json     how the rows of the test split were answered, in short
report.html     all of this for people
"""

import errno
import fcntl
import json
import math
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
from sft_jax.config.training import TrainSection
from sft_jax.errors import NO_ROOM, RunError, SftError, listing, reason
from sft_jax.train.checkpoint import steps_in
from sft_jax.train.manifest import MODEL_CONFIG, command, utc_now
from sft_jax.train.optim import first_step

# Keys that change how a run goes but not what it computes, so that a resumed run may differ in them.
LENGTH = ("train.epochs", "train.steps")  # which `run.extend` may raise
FREE = ("run", "mesh", "data.prefetch", "data.workers", "data.cache", "train.log_every", "train.scan",
        "train.remat", "eval.baselines",
        "checkpoint.keep", "checkpoint.on_error", "report")  # fmt: skip
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of a file system that has none


def is_used(directory: Path) -> bool:
    """Whether a run began here."""
    return (directory / "config.yaml").is_file()


def check(config: Config, directory: Path) -> None:
    """Refuse a directory that this run may not go on in; says why, and what to do."""
    try:
        _check_kind(config, directory)
    except (OSError, ValueError) as error:
        raise RunError(f"{directory}: cannot be looked into ({reason(error)}); give another run.dir") from None
    if not is_used(directory):
        return
    differing = [
        f"{key}: {there!r} there, {now!r} now" for key, (there, now) in _changed(config, directory).items()
        if not (_is_free(key) or (config.run.extend and key in LENGTH))
    ]  # fmt: skip
    if differing:
        longer = all(line.startswith(LENGTH) for line in differing)
        remedy = "to go on with more steps: run.extend=true" if longer else "or the same settings"
        raise RunError(listing(f"{directory} holds another run; give another run.dir, {remedy}", differing))


def _check_kind(config: Config, directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise RunError(f"{directory}: is a file; give another run.dir")
    if config.run.resume == "never" and is_used(directory):
        raise RunError(f"{directory}: holds a run, and run.resume is never; give another run.dir")
    if config.run.resume == "must" and not is_used(directory):
        raise RunError(f"{directory}: holds no run, and run.resume is must; check run.dir")
    if (directory / "checkpoints").exists() and not (directory / "checkpoints").is_dir():
        raise RunError(f"{directory / 'checkpoints'}: is a file; move it away, or give another run.dir")


def _changed(config: Config, directory: Path) -> dict[str, tuple[Any, ...]]:
    return differences(_read(directory / "config.yaml", parse_value), parse_value(write_config(config)))


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


def begin(config: Config, directory: Path, manifest: Mapping[str, Any], steps: int, epoch: int) -> None:
    """Write down what run this is, of how many steps, `epoch` of them an epoch; or check that it is the one that began
    here, with the same data and weights, and write down how many steps more it is to have."""
    if not is_used(directory):
        if config.run.extend:
            raise RunError(f"{directory}: holds no run, and run.extend goes on with one; check run.dir")
        directory.mkdir(parents=True, exist_ok=True, mode=0o750)
        write_json(directory / "manifest.json", manifest)
        write_whole(directory / "config.yaml", write_config(config))
        return
    check(config, directory)  # again: another run may have begun since
    check_read(directory, manifest)
    if any(key in LENGTH for key in _changed(config, directory)):
        _extend(config, directory, manifest, steps, epoch)


def check_read(directory: Path, now: Mapping[str, Any]) -> None:
    """Refuse what a run reads, as far as `now` says it, where it is not what the run was trained with.

    What the manifest of an earlier version does not say is not compared.
    """
    before = _read(directory / "manifest.json", json.loads)
    data, weights = before.get("data", {}), before.get("weights", {})
    splits = [
        split
        for split, part in now["data"].items()
        if any(data.get(split, {key: None}).get(key, value) != value for key, value in part.items())
    ]
    files = [
        name
        for name in sorted({*weights, *now["weights"]})
        if weights.get(name) != now["weights"].get(name) and (name != MODEL_CONFIG or name in weights)
    ]
    whole = [what for what in ("task", "tokenizer") if before.get(what, now[what]) != now[what]]
    differing = [*(f"data: {split} is" for split in splits), *(f"weights: {file} is" for file in files), *whole]
    if differing:
        where = f"{directory}: put back what it reads, or give another run"
        problems = [
            f"{what}{'' if what.endswith(' is') else ':'} not what the run was trained with" for what in differing
        ]
        raise RunError(listing(where, problems))


def _extend(config: Config, directory: Path, manifest: Mapping[str, Any], steps: int, epoch: int) -> None:
    """Write down that the run is to have more steps."""
    section = TrainSection.model_validate(_read(directory / "config.yaml", parse_value)["train"])
    before = section.steps or math.ceil(section.epochs * epoch)
    if steps < before:
        raise RunError(f"{directory}: was to have {before} steps, and {steps} are fewer; give more, or another run.dir")
    moved = [u.match for u in config.train.unfreeze if first_step(u, before) != first_step(u, steps)]
    if moved:
        raise RunError(
            f"{directory}: train.unfreeze: '{moved[0]}' begins at a share of the steps, and would begin anew with more "
            f"of them; such a run cannot be extended, give another run.dir"
        )
    there = _read(directory / "manifest.json", json.loads)
    newest = max(steps_in(directory / "checkpoints"), default=0)
    entry = {"step": newest, "before": before, "after": steps, "time": utc_now()}
    there |= {"config": manifest["config"], "extensions": [*there.get("extensions", []), entry]}
    write_json(directory / "manifest.json", there)
    write_whole(directory / "config.yaml", write_config(config))


def extensions(directory: Path) -> list[dict[str, Any]]:
    """How a run was extended, in order."""
    return _read(directory / "manifest.json", json.loads).get("extensions", [])


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


def read_summary(directory: Path) -> dict[str, Any]:
    """What a run that was done summed up; nothing where it was not, or where that cannot be read."""
    try:
        found = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


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
