"""What jax tells of a run: a trace of some of its steps, for TensorBoard's profiler or xprof, and what it compiled."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

HIT, MISS = ("/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses")
_events: Counter[str] = Counter()
jax.monitoring.register_event_listener(lambda event, **more: _events.update([event] if event in (HIT, MISS) else []))


def programs() -> dict[str, int]:
    """How many programs this process found among those that are kept, and how many it compiled and keeps from now on.

    Without a place to keep them jax counts neither, and small ones are not worth one.
    """
    return {"found": _events[HIT], "compiled": _events[MISS]}


class Trace:
    """The trace of the steps from the first to the last one given, both included; none given, nothing happens."""

    def __init__(self, steps: Sequence[int] | None = None, home: Path | None = None):
        self._steps, self._home = steps, home
        self._running = False

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop()

    @contextmanager
    def over(self, first: int, last: int) -> Iterator[None]:
        """A call that takes these steps is inside."""
        if self._steps and not self._running and first <= self._steps[1] and last >= self._steps[0]:
            jax.profiler.start_trace(str(self._home))
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=first):
            yield

    def end(self, last: int, metrics: Any) -> None:
        """The call that took the steps up to this one has returned what it measured; waits where it was the last."""
        if self._steps and self._running and last >= self._steps[1]:
            jax.block_until_ready(metrics)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
