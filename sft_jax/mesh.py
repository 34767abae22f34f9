"""Devices: the mesh, where each parameter and batch lies on it, and the start of several processes.

Axes of the mesh are `data` (the batch alone), `fsdp` (batch, parameters and optimizer state) and `tensor` (heads and
hidden layers). Knows no model: parameters come with the logical names of their dimensions.
"""

import math
import os
import re
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sft_jax.config.schema import MeshSection
from sft_jax.errors import ConfigError, ProcessError, reason

AXES = ("data", "fsdp", "tensor")
ROWS, HEADS = ("data", "fsdp"), "tensor"  # axes over which a batch is divided, and attention
BATCH = P(ROWS)
# Logical name of a dimension -> axis that it is divided over. Names not listed here are whole on every device.
RULES = {"embed": "fsdp", "heads": HEADS, "mlp": "tensor", "vocab": "tensor"}
# How a launcher tells a process of several who it is, and how many seconds it may wait for the others.
COORDINATOR, PROCESSES, PROCESS, WAIT = "SFT_COORDINATOR", "SFT_NUM_PROCESSES", "SFT_PROCESS_ID", "SFT_WAIT"
SECONDS, LONGEST = 45, 3_000  # that it waits if nothing is said, and at most
# What errors of jax speak of when another process is gone: collectives of CPUs and GPUs, and the service of processes.
PEERS = re.compile(r"gloo|nccl|coordination|barrier|heartbeat|connection (closed|reset) by peer", re.IGNORECASE)


def start_processes() -> None:
    """Join the other processes where a launcher set `SFT_COORDINATOR`; alone, do nothing.

    jax by itself waits for five minutes, and then ends the process where it stands.
    """
    given = [name for name in (COORDINATOR, PROCESSES, PROCESS) if os.environ.get(name)]
    if not given or jax.distributed.is_initialized():
        return
    if len(given) < 3:
        raise ConfigError(f"environment: {' and '.join(given)} alone; set {COORDINATOR}, {PROCESSES} and {PROCESS}")
    count, mine = _whole(PROCESSES, 1), _whole(PROCESS, 0)
    seconds = _whole(WAIT, 1, LONGEST) if os.environ.get(WAIT) else SECONDS
    if mine >= count:
        raise ConfigError(
            f"environment: {PROCESS}={mine} of {PROCESSES}={count}; they are counted from 0 to {count - 1}"
        )
    coordinator = os.environ[COORDINATOR]
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"environment: {COORDINATOR}={coordinator}; expected host:port, such as 10.0.0.1:1234")
    until = time.monotonic() + seconds
    if mine == 0:
        _see_free(coordinator, int(port))
    else:
        _see_answering(coordinator, host.strip("[]"), int(port), until)
    _join(coordinator, count, mine, until)


def _whole(name: str, least: int, most: int = 1_000_000) -> int:
    text = os.environ[name]
    if not text.isdecimal() or not least <= int(text) <= most:
        raise ConfigError(f"environment: {name}={text}; expected a whole number from {least} to {most}")
    return int(text)


def _see_free(coordinator: str, port: int) -> None:
    """Raise where this machine would not let the first process listen, of which only jax's log would tell."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise ConfigError(
            f"environment: {COORDINATOR}={coordinator}; process 0 cannot listen there ({error.strerror}); "
            f"give another port"
        ) from None


def _see_answering(coordinator: str, host: str, port: int, until: float) -> None:
    """Wait until somebody listens at the address; raise where nobody does in time."""
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, min(5, until - time.monotonic()))).close()
            return
        except OSError as error:
            if time.monotonic() + 1 > until:
                why = "no answer" if isinstance(error, TimeoutError) else error.strerror or error
                raise ProcessError(
                    f"environment: {COORDINATOR}={coordinator}; process 0 cannot be reached there ({why}); start it, "
                    f"see that the address is its own, or set {WAIT} to more seconds"
                ) from None
        time.sleep(0.5)


def _join(coordinator: str, count: int, mine: int, until: float) -> None:
    """Wait in a thread, which can be left: jax's own end of waiting is that of the process."""
    found: list[Exception] = []

    def join() -> None:
        try:
            jax.distributed.initialize(coordinator, count, mine, initialization_timeout=LONGEST + 600)
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(max(1.0, until - time.monotonic()))
    if found:
        raise ProcessError(f"environment: {COORDINATOR}={coordinator}; the processes cannot join ({reason(found[0])})")
    if thread.is_alive():
        raise ProcessError(
            f"environment: {PROCESSES}={count}, but not all of them came to {COORDINATOR}={coordinator} in time; start "
            f"the others, see that the address is that of process 0, or set {WAIT} to more seconds"
        )


def lost_peer(error: BaseException) -> str | None:
    """What an error says of a process of the run that is gone; None where it is of something else."""
    if not jax.distributed.is_initialized():
        return None
    chain: BaseException | None = error
    while chain is not None:
        if PEERS.search(str(chain)):
            return reason(chain)
        chain = chain.__cause__ or chain.__context__
    return None


def is_first_process() -> bool:
    """Whether this process writes reports and exports."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Until every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def in_all(good: bool) -> bool:
    """Whether it is so in every process; each must ask."""
    if jax.process_count() == 1:
        return good
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.asarray(good))))


def of_first(numbers: Sequence[int]) -> list[int]:
    """The numbers that the first process has, in every process; each must ask."""
    if jax.process_count() == 1:
        return list(numbers)
    from jax.experimental import multihost_utils

    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    mine = np.asarray([*numbers, *[0] * count][:count], np.int32)
    return multihost_utils.broadcast_one_to_all(mine).tolist()


def make_mesh(section: MeshSection) -> Mesh:
    """The mesh over all devices of all processes, or over the first of them where `data` asks for fewer."""
    devices = jax.devices()
    fixed = section.fsdp * section.tensor
    data = len(devices) // fixed if section.data == -1 else section.data
    wanted = data * fixed
    if not 0 < wanted <= len(devices) or (wanted < len(devices) and (section.data == -1 or jax.process_count() > 1)):
        raise ConfigError(
            f"mesh: data={section.data} fsdp={section.fsdp} tensor={section.tensor} cannot be laid over "
            f"{len(devices)} device{'s' if len(devices) > 1 else ''}; make their product that number"
        )
    shape = (data, section.fsdp, section.tensor)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:wanted])


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are divided."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, *, stacked: bool = False) -> NamedSharding:
    """Rows divided over `data` and `fsdp`; of batches that are stacked, these are the second axis."""
    return NamedSharding(mesh, P(None, *BATCH) if stacked else BATCH)


def param_shardings(
    mesh: Mesh, axes: Mapping[str, tuple[str, ...]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, NamedSharding]:
    """Where each parameter lies. A dimension that its axis does not divide evenly stays whole.

    So do vectors over `fsdp`: little is saved, and every one would have to be gathered wherever it is read.
    """

    def spec(path: str) -> P:
        vector = sum(name != "layers" for name in axes[path]) == 1
        names = [RULES.get(name) for name in axes[path]]
        fitting = (
            axis and size % mesh.shape[axis] == 0 and not (vector and axis == "fsdp")
            for axis, size in zip(names, shapes[path], strict=True)
        )
        return P(*(axis if fits else None for axis, fits in zip(names, fitting, strict=True)))

    return {path: NamedSharding(mesh, spec(path)) for path in shapes}


def fitting(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """The same, of an array of another shape: whole along each dimension that an axis does not divide."""
    names = zip((*sharding.spec, *(None,) * len(shape)), shape, strict=False)
    sizes = [
        (name, size, math.prod(sharding.mesh.shape[a] for a in np.atleast_1d(name)) if name else 1)
        for name, size in names
    ]
    return NamedSharding(sharding.mesh, P(*(name if size % parts == 0 else None for name, size, parts in sizes)))


def like_params(
    tree: Any,
    shardings: Mapping[str, NamedSharding],
    shapes: Mapping[str, tuple[int, ...]],
    mesh: Mesh,
) -> Any:
    """Shardings of an optimizer state: leaves that stand under a parameter's path and have its shape lie as it does."""

    def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [e.key for e in path if isinstance(e, jax.tree_util.DictKey) and e.key in shardings]
        same = bool(names) and tuple(leaf.shape) == shapes[names[-1]]
        return shardings[names[-1]] if same else replicated(mesh)

    return jax.tree_util.tree_map_with_path(of, tree)


def put(arrays: Mapping[str, Any], shardings: Any) -> dict[str, jax.Array]:
    """Host arrays, the same in every process, as global arrays; `shardings` is one for all or one for each."""
    each: Any = shardings if isinstance(shardings, Mapping) else dict.fromkeys(arrays, shardings)
    if jax.process_count() == 1:
        return jax.device_put(dict(arrays), each)
    return jax.tree.map(
        lambda a, s: jax.make_array_from_callback(a.shape, s, lambda index: a[index]), dict(arrays), each
    )


def to_host(tree: Any) -> Any:
    """Global arrays as whole numpy arrays, in every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)
