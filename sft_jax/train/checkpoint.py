"""Checkpoints of a run: the training state and what the loop knows, asynchronously, the latest and the best.

A checkpoint is of the trainable parameters; frozen ones are those of the pretrained model, whose digest the manifest
has. Restoring is onto the mesh of now, whatever mesh the checkpoint was written from.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint import checkpoint_managers

from sft_jax.errors import RunError, listing
from sft_jax.train.state import TrainState

logging.set_verbosity(logging.ERROR)  # orbax tells of its every step


@dataclass
class Progress:
    """What the loop knows beside the arrays; small, and in every checkpoint."""

    step: int = 0
    best_step: int | None = None
    best_value: float | None = None
    finished: bool = False
    evaluations: list[dict[str, Any]] = field(default_factory=list)  # step and metrics of each validation
    left: dict[str, Any] = field(default_factory=dict)  # of an interval of metrics that a stop came into


@dataclass
class _KeepLatestAndBest:
    """Orbax's own best-of policy forgets the metrics of earlier processes; this one is told the best step."""

    latest: int
    best: int | None = None

    def should_preserve(
        self, checkpoints: Sequence[checkpoint_managers.PolicyCheckpointInfo], *, context: Any
    ) -> list[bool]:
        newest = len(checkpoints) - self.latest
        return [i >= newest or c.step == self.best for i, c in enumerate(checkpoints)]


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, directory: Path, keep: int):
        self._policy = _KeepLatestAndBest(keep)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy, cleanup_tmp_directories=True, create=True
        )
        self.directory = directory
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options, item_names=("state", "progress"))

    def save(self, state: TrainState, progress: Progress) -> None:
        """Begin to save; returns as soon as the arrays are copied. A step that stands already is left alone."""
        self._manager.check_for_errors()
        self._policy.best = progress.best_step
        if progress.step in self._manager.all_steps():
            return
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(_as_tree(state)),
            progress=ocp.args.JsonSave(asdict(progress)),
        )
        if not self._manager.save(progress.step, args=arguments, force=True):
            newest = self._manager.latest_step()
            raise RunError(f"{self.directory}: step {progress.step} was not saved beside step {newest}")

    def steps(self) -> list[int]:
        """The steps that can be restored, oldest first."""
        return sorted(self._manager.all_steps())

    def restore(self, abstract: TrainState, shardings: TrainState, step: int) -> tuple[TrainState, Progress]:
        """State and progress of a step; shapes, types and shardings are those asked for, or it is an error."""
        wanted = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            _as_tree(abstract),
            _as_tree(shardings),
        )
        self._check(wanted, step)
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted), progress=ocp.args.JsonRestore()),
        )
        return TrainState(**found["state"]), Progress(**found["progress"])

    def progress(self, step: int) -> Progress:
        """What the loop knew at a step."""
        arguments = ocp.args.Composite(progress=ocp.args.JsonRestore())
        return Progress(**self._manager.restore(step, args=arguments)["progress"])

    def wait(self) -> None:
        """Until every save is on disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish and let go."""
        self._manager.close()

    def _check(self, wanted: Any, step: int) -> None:
        """Orbax casts a type and says nothing; a checkpoint of other parameters is refused by name."""
        handler = ocp.StandardCheckpointHandler()
        saved: Any = handler.metadata(epath.Path(self.directory.absolute() / str(step) / "state"))
        found = {jax.tree_util.keystr(p): a for p, a in jax.tree_util.tree_leaves_with_path(saved.tree["params"])}
        problems = []
        for path, leaf in jax.tree_util.tree_leaves_with_path(wanted["params"]):
            name = jax.tree_util.keystr(path)
            if name not in found:
                problems.append(f"{name}: not in the checkpoint")
            elif (tuple(found[name].shape), found[name].dtype) != (leaf.shape, leaf.dtype):
                saved_as = f"{found[name].dtype}{list(found[name].shape)}"
                problems.append(f"{name}: saved as {saved_as}, expected {leaf.dtype}{list(leaf.shape)}")
        if problems:
            raise RunError(listing(f"{self.directory}: step {step}", problems))


def _as_tree(state: TrainState) -> dict[str, Any]:
    return {name: part for name, part in vars(state).items() if part is not None}
