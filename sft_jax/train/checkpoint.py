"""Checkpoints of a run: the training state and what the loop knows, asynchronously, the latest and the best.

checkpoints/12/state     arrays, written by orbax
checkpoints/12/manifest  what the loop knows, a digest of each array, and a digest of the manifest itself

A checkpoint is of the trainable parameters; frozen ones are those of the pretrained model, whose digest the run's
manifest has. Restoring is onto the mesh of now, whatever mesh the checkpoint was written from, and what comes back is
what was written, or it is an error: orbax by itself reads a flipped bit and says nothing. A step appears whole, by a
rename; it counts as saved once it has been opened again, and only then are older ones taken away. Looking changes
nothing; only saving clears away what a killed process left.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import absl.logging
import jax
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from orbax.checkpoint import checkpoint_managers

from sft_jax import mesh as meshes
from sft_jax.errors import NO_ROOM, RunError, listing
from sft_jax.train.digest import digests, name
from sft_jax.train.state import TrainState

SCHEMA = 1
SHOWN = 5  # problems that a message names; the others are counted
LONGEST = 120  # characters that are shown of an error of orbax
ELSEWHERE = "another process could not read it"
DAMAGED = "damaged"  # where checkpoints go that cannot be restored
UNFINISHED = ".orbax-checkpoint-tmp"  # how orbax names what is not whole, and clears it away
# Characters of a path that mean themselves to orbax, which reads paths as patterns, and to tensorstore.
PLAIN = re.compile(r"[\w/.,=+@~ -]*")
OPEN_FILES = Path("/proc/self/fd")
# Memory and devices: neither says anything about what is on the disk.
NOT_STORAGE = (MemoryError, jax.errors.JaxRuntimeError)


def _hush() -> None:
    """Orbax tells of its every step; and when one array fails, those begun beside it complain on stderr, each for
    itself, that nobody waits for them any more. What is to be known of that is told here."""
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    hear = sys.unraisablehook

    def listen(found: Any) -> None:
        forgotten = "orbax" in getattr(getattr(found.object, "cr_code", None), "co_filename", "")
        if not forgotten and str(found.exc_value) != "Event loop is closed":
            hear(found)

    sys.unraisablehook = listen


_hush()


@dataclass
class Progress:
    """What the loop knows beside the arrays; small, and in every checkpoint."""

    step: int = 0
    best_step: int | None = None
    best_value: float | None = None
    finished: bool = False
    evaluations: list[dict[str, Any]] = field(default_factory=list)  # step and metrics of each validation
    left: dict[str, Any] = field(default_factory=dict)  # of an interval of metrics that a stop came into

    def forget_best(self) -> None:
        """The best step is no more; the next evaluation begins anew."""
        self.best_step = self.best_value = None


class _KeepAll:
    """What orbax may take away of its own accord: nothing, since it does not know yet whether a step can be opened."""

    def should_preserve(
        self, checkpoints: Sequence[checkpoint_managers.PolicyCheckpointInfo], *, context: Any
    ) -> list[bool]:
        return [True for _ in checkpoints]


class Checkpoints:
    """The checkpoints of one run directory; every process of a run calls the same methods in the same order.

    `warn` is told of a save that failed; without it, such a save is a RunError.
    """

    def __init__(self, directory: Path, keep: int, warn: Callable[[str], None] | None = None):
        self.directory = directory
        self._keep = keep
        self._warn = warn
        self._manager: ocp.CheckpointManager | None = None  # made when there is something to save
        self._saving: tuple[int, Progress, int] | None = None  # the step that is being written, and its arrays
        self._opened: int | None = None  # the directory as an open file, where its path means more than itself
        if not _is_plain(directory) and not OPEN_FILES.is_dir():
            odd = "".join(dict.fromkeys(PLAIN.sub("", str(directory.absolute()))))
            raise RunError(f"{directory}: checkpoints cannot be saved under a path with {odd}; give another run.dir")

    def steps(self) -> list[int]:
        """The steps that stand, oldest first; whether they can be restored is seen by restoring."""
        return meshes.of_first(steps_in(self.directory))

    def save(self, state: TrainState, progress: Progress) -> None:
        """Begin to save; returns as soon as the arrays are copied. A step that stands already is left alone.

        `progress` is kept in sight until all is written: a step that could not be saved is not the best one.
        """
        self.wait()
        if progress.step in self.steps():
            return
        tree = _as_tree(state)
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(tree), manifest=ocp.args.JsonSave(_manifest(tree, progress))
        )
        self._saving = (progress.step, progress, len(jax.tree.leaves(tree)))
        self._try(lambda manager: manager.save(progress.step, args=arguments, force=True))

    def check(self) -> None:
        """See whether the save in the background has failed; waits for nothing, so that every step can ask."""
        if self._saving and self._manager and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Until what is being saved is on disk and has been opened again, or has failed; older ones then go."""
        if self._manager:
            self._try(lambda manager: manager.wait_until_finished())
        if self._saving:
            step, progress, leaves = self._saving
            if problem := _unopened(self._path(step), leaves):
                if meshes.is_first_process():
                    self._move(step, DAMAGED)
                self._failed(problem)
            elif meshes.is_first_process():
                self._take_away(progress.best_step)
        self._saving = None

    def restore(self, abstract: TrainState, shardings: TrainState, step: int) -> tuple[TrainState, Progress]:
        """State and progress of a step; shapes, types and shardings are those asked for, and every bit is as it was.

        A checkpoint that is damaged, or of other parameters, is a RunError that says in which way.
        """
        wanted = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), _as_tree(abstract), _as_tree(shardings)
        )
        manifest, found, problems = self._read(step, wanted)
        if not meshes.in_all(not problems):
            raise self._refusal(step, problems or [ELSEWHERE])
        now = digests(found)
        problems = [f"{leaf}: not what was written" for leaf in now if now[leaf] != manifest["leaves"][leaf]["digest"]]
        if problems:
            raise self._refusal(step, problems)
        return TrainState(**{**dict.fromkeys(vars(abstract)), **found}), Progress(**manifest["progress"])

    def progress(self, step: int) -> Progress:
        """What the loop knew at a step."""
        manifest, problems = _read_manifest(self._path(step))
        if not meshes.in_all(not problems):
            raise self._refusal(step, problems or [ELSEWHERE])
        return Progress(**manifest["progress"])

    def leaves(self, step: int) -> list[str]:
        """The paths of what a step holds; of one whose manifest cannot be read, none."""
        return list(_read_manifest(self._path(step))[0].get("leaves", ()))

    def set_aside(self, steps: Sequence[int], name: str) -> None:
        """Move steps, or what stands in their place, into a directory beside them, where no run looks again."""
        if meshes.is_first_process():
            for step in steps:
                self._move(step, name)
        meshes.wait_for_all("checkpoints set aside")

    def close(self) -> None:
        """Finish and let go."""
        self.wait()
        if self._manager:
            self._manager.close()
            self._manager = None
        if self._opened is not None:
            os.close(self._opened)
            self._opened = None

    def _move(self, step: int, name: str) -> None:
        there = self.directory / name
        names = (str(step), *(f"{step}-{number}" for number in range(2, 1000)))  # it may happen twice
        try:
            there.mkdir(exist_ok=True)
            (self.directory / str(step)).rename(next(there / n for n in names if not (there / n).exists()))
        except OSError as error:
            raise RunError(f"{there}: step {step} cannot be moved there ({error.strerror}); do it") from None

    def _take_away(self, best: int | None) -> None:
        """Delete all but the latest and the best; each first loses its name, so that no half of it is ever found."""
        for step in steps_in(self.directory)[: -self._keep]:
            if step != best:
                unfinished = self.directory / f"{step}{UNFINISHED}"
                with suppress(OSError):
                    (self.directory / str(step)).rename(unfinished)
                    shutil.rmtree(unfinished)

    def _home(self) -> Path:
        """The directory under a name that is no pattern: its own, or that of an open file."""
        if _is_plain(self.directory) or not self.directory.is_dir():
            return self.directory.absolute()
        if self._opened is None:
            self._opened = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        return OPEN_FILES / str(self._opened)

    def _try(self, do: Callable[[ocp.CheckpointManager], object]) -> None:
        """Have something done by orbax, and tell of it where that fails."""
        try:
            if self._manager is None:
                self.directory.mkdir(parents=True, exist_ok=True)
                options = ocp.CheckpointManagerOptions(
                    preservation_policy=_KeepAll(), cleanup_tmp_directories=True, create=False
                )
                self._manager = ocp.CheckpointManager(self._home(), options=options, item_names=("state", "manifest"))
            do(self._manager)
            return
        except NOT_STORAGE:
            raise
        except Exception as error:
            if meshes.lost_peer(error):  # nor does that
                raise
            reason = _reason(error)
        self._failed(reason)

    def _failed(self, reason: str) -> None:
        if self._manager:
            with suppress(Exception):
                self._manager.close()
        self._manager = None  # it takes the step for one that stands
        step, progress, _ = self._saving or (0, Progress(), 0)
        self._saving = None
        if progress.best_step == step:
            progress.forget_best()
        what = f"{self.directory}: step {step} could not be saved ({reason})"
        full = reason in {os.strerror(number) for number in NO_ROOM}
        if self._warn is None:
            left = steps_in(self.directory)
            where = f"goes on after step {left[-1]}" if left else "begins again"
            remedy = "make room for it" if full else "mend what is in its way"
            raise RunError(f"{what}; {remedy}, and the same command {where}") from None
        self._warn(f"{what}; {'make room for the next one' if full else 'the next one is tried'}")

    def _path(self, step: int) -> epath.Path:
        return epath.Path(self._home()) / str(step)

    def _read(self, step: int, wanted: Any) -> tuple[dict[str, Any], Any, list[str]]:
        """(manifest, tree, problems) of a step; there is a tree where there is no problem."""
        manifest, problems = _read_manifest(self._path(step))
        problems = problems or _differences(manifest["leaves"], _arrays(wanted))
        if problems:
            return manifest, None, problems
        source, arguments = self._path(step) / "state", ocp.args.StandardRestore(wanted)
        try:
            return manifest, ocp.StandardCheckpointHandler().restore(source, args=arguments), []
        except NOT_STORAGE:
            raise
        except Exception as error:  # what damaged files make of their reader can be any error at all
            return manifest, None, [f"state: cannot be read ({_reason(error)})"]

    def _refusal(self, step: int, problems: Sequence[str]) -> RunError:
        more = max(0, len(problems) - SHOWN)
        return RunError(listing(f"{self.directory}: step {step}", problems[:SHOWN], more))


def _is_plain(directory: Path) -> bool:
    return PLAIN.fullmatch(str(directory.absolute())) is not None


def _unopened(path: epath.Path, leaves: int) -> str | None:
    """Why a step that was just saved does not have so many arrays, as their reader finds them; None where it does."""
    try:
        found = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{path / 'state'}/"}).result()
        keys = [key.decode().rpartition("/") for key in found.list().result()]
        described = {name for name, _, part in keys if part == ".zarray"}
        held = {name for name, _, part in keys if part != ".zarray"}
        for reading in [found.read(f"{name}/.zarray") for name in described]:
            reading.result()
    except Exception as error:  # what damaged files make of their reader can be any error at all
        return f"it cannot be opened again: {_reason(error)}"
    whole = len(described & held)
    return None if whole == leaves else f"it cannot be opened again: {whole} of {leaves} arrays are there"


def _as_tree(state: TrainState) -> dict[str, Any]:
    """What of the state there is, by the name of the field."""
    return {field: value for field, value in vars(state).items() if value is not None}


def steps_in(directory: Path) -> list[int]:
    """The steps that stand in a directory of checkpoints, oldest first."""
    names = [entry.name for entry in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


def _arrays(tree: Any) -> dict[str, str]:
    """Path of each leaf -> type and shape."""
    return {name(p): f"{a.dtype}{list(a.shape)}" for p, a in jax.tree_util.tree_leaves_with_path(tree)}


def _manifest(tree: Any, progress: Progress) -> dict[str, Any]:
    found = digests(tree)
    leaves = {leaf: {"array": array, "digest": found[leaf]} for leaf, array in _arrays(tree).items()}
    content = {"schema": SCHEMA, "progress": asdict(progress), "leaves": leaves}
    return {**content, "sha256": _sha256(content)}


def _read_manifest(path: epath.Path) -> tuple[dict[str, Any], list[str]]:
    """(manifest of a step, problems): there is one where there is no problem."""
    if not path.is_dir():
        return {}, ["is a file, not a checkpoint" if path.exists() else "is not there"]
    try:
        manifest = dict(ocp.JsonCheckpointHandler().restore(path / "manifest"))
    except FileNotFoundError:
        return {}, ["manifest: is not there"]
    except OSError as error:
        return {}, [f"manifest: cannot be read ({_reason(error)})"]
    except (ValueError, TypeError, RecursionError):
        return {}, ["manifest: not JSON"]
    if manifest.get("sha256") != _sha256(manifest):
        return {}, ["manifest: not what was written"]
    if manifest.get("schema") != SCHEMA:
        return {}, [
            f"manifest: of schema {manifest.get('schema')}, this is for {SCHEMA}; use the version that wrote it"
        ]
    return manifest, []


def _differences(saved: Mapping[str, Any], wanted: Mapping[str, str]) -> list[str]:
    """In what the arrays of a checkpoint are not those that are wanted; orbax would cast them, and say nothing."""
    both = {path: saved[path]["array"] for path in wanted if path in saved}
    return [
        *(f"{path}: not in the checkpoint" for path in wanted if path not in saved),
        *(f"{path}: in the checkpoint, not in this run" for path in saved if path not in wanted),
        *(f"{path}: saved as {a}, expected {wanted[path]}" for path, a in both.items() if a != wanted[path]),
    ]


def _sha256(content: Any) -> str:
    text = json.dumps({k: v for k, v in content.items() if k != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _reason(error: Exception) -> str:
    """What an error of orbax comes to: what the system said, or its first line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if code := re.search(r"os_error_code='(\d+)'", text):
        return os.strerror(int(code[1]))
    first = (text.strip().splitlines() or [type(error).__name__])[0]
    return first if len(first) <= LONGEST else f"{first[:LONGEST]} ..."
