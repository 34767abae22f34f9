"""A process that trains on request in children that a test may kill: `crash_worker.py`, spoken to by `Zygote`.

It has imported everything and started no backend of jax, so a child begins to work at once. Each line it reads is a
request; what it and its children write are events, a line of JSON each: `pid` and `code` of a child, the step of each
line of metrics, and the step of each checkpoint that is about to be written (`save`) or is being written (`writing`).
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_jax.config.read import read_config
from sft_jax.errors import SftError
from sft_jax.jobs import train
from sft_jax.run import prepare
from sft_jax.train.checkpoint import Checkpoints

Event = dict[str, Any]
STEP = 0.004  # seconds that a step takes at least, so that a test can be quicker


class Zygote:
    """The test's side of it: starts the process, asks for a run, and hears what becomes of it."""

    def __init__(self) -> None:
        flags = "--xla_backend_optimization_level=0"  # one device
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def train(self, config: Path, log: Path, overrides: Sequence[str] = (), file_size: int | None = None) -> None:
        """Begin to train in a child; `file_size` is the largest file it may write from its first checkpoint on, until
        it is told of a save that failed."""
        request = {"config": str(config), "log": str(log), "overrides": list(overrides), "file_size": file_size}
        assert self._process.stdin
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def events(self) -> Iterator[Event]:
        """What happens, up to and with the end of the child."""
        assert self._process.stdout
        for line in self._process.stdout:
            event = json.loads(line)
            yield event
            if event["kind"] == "code":
                return

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


class Told:
    """A sink that writes events down the pipe."""

    def emit(self, kind: str, values: Mapping[str, Any]) -> None:
        """Tell of the event; a failed save has its room back."""
        if "could not be saved" in values.get("text", ""):
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        say(kind, **{k: values[k] for k in ("step", "text") if k in values})
        time.sleep(STEP)

    def stop(self) -> None:
        """Nothing is shown, so there is nothing to take away."""


def say(kind: str, **values: Any) -> None:
    """Write an event, in one piece."""
    os.write(1, (json.dumps({"kind": kind, **values}) + "\n").encode())


def child(request: Mapping[str, Any]) -> int:
    """Train as the command line does; gives the exit code."""
    os.dup2(os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    save = Checkpoints.save

    def told_save(self: Checkpoints, state: Any, progress: Any) -> None:
        say("save", step=progress.step)
        if request["file_size"]:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"], hard))
            request["file_size"] = None
        save(self, state, progress)
        say("writing", step=progress.step)

    Checkpoints.save = told_save
    try:
        train(prepare(read_config([request["config"]], request["overrides"])), Told())  # type: ignore[arg-type]
    except SftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def main() -> None:
    """Answer requests until there are no more."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            sys.exit(child(json.loads(line)))
        say("pid", pid=pid)
        _, status = os.waitpid(pid, 0)
        say("code", code=os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
