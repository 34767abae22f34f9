"""Metrics of training steps, fetched one interval late so that the device never waits, and throughput."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from sft_jax.errors import NonFiniteError
from sft_jax.mesh import to_host
from sft_jax.train.report import Sink

IN_FLIGHT = 4  # steps dispatched and not yet done; more would only hold memory


class Meter:
    """Collects what steps return and reports it by intervals."""

    def __init__(
        self,
        steps: int,
        every: int,
        max_skipped: int,
        rate: Callable[[int], Any],
        sinks: Sequence[Sink],
        left: Mapping[str, Any] | None = None,
        waiting: Callable[[], float] = lambda: 0.0,
    ):
        """`left` is what `flush` gave of an interval that an earlier process began.

        `waiting` gives the seconds that were spent on waiting for batches so far.
        """
        self._steps, self._every, self._max_skipped, self._rate, self._sinks = steps, every, max_skipped, rate, sinks
        self._running: deque[Any] = deque()
        self._open: list[tuple[int, Any]] = []  # steps of the interval that is being filled
        # The one before, its seconds, and those of them that were spent on waiting.
        self._late: tuple[list[tuple[int, Any]], float, float] | None = None
        self._left = dict(left or {})
        self._begun = time.perf_counter() - self._left.get("seconds", 0.0)
        self._waiting = waiting
        self._waited = waiting() - self._left.get("waited", 0.0)  # when the interval began
        self._reports = 0
        self._tokens, self._seconds = 0, 0.0  # of all intervals after the first, or of that one where it is alone

    def add_all(self, step: int, metrics: Any, begun: float) -> None:
        """Take what a call returned for the steps up to this one, stacked; waits for it. They took as long each."""
        held = to_host(metrics)
        count, now = len(held["tokens"]), time.perf_counter()
        for number in range(count):
            one = jax.tree.map(lambda leaf, n=number: leaf[n : n + 1].reshape(leaf.shape[1:]), held)
            self.add(step - count + number + 1, one, begun + (now - begun) * (number + 1) / count)

    def add(self, step: int, metrics: Any, now: float | None = None) -> None:
        """Take what a step returned; reports the interval before when this one is full."""
        self._running.append(metrics["tokens"])
        if len(self._running) > IN_FLIGHT:
            jax.block_until_ready(self._running.popleft())
        self._open += [*self._taken_up(metrics), (step, metrics)]
        if step % self._every == 0:
            now = time.perf_counter() if now is None else now
            self._report()
            waited = self._waiting()
            self._late = (self._open, now - self._begun, waited - self._waited)
            self._open, self._begun, self._waited = [], now, waited

    def flush(self, *, whole: bool = True) -> dict[str, Any]:
        """Report all there is; gives what a later process needs to finish an interval, where it is not to end here."""
        self._report()
        if not self._open:
            return {}
        jax.block_until_ready(self._open[-1][1])
        entries, seconds, waited = self._open, time.perf_counter() - self._begun, self._waiting() - self._waited
        self._late = (entries, seconds, waited)
        self._open = [] if whole else entries
        fetched = self._report(whole)
        values = [{name: leaf.item() for name, leaf in _named(metrics)} for metrics in fetched]
        steps = [[step, found] for (step, _), found in zip(entries, values, strict=True)]
        return {} if whole else {"seconds": seconds, "waited": waited, "steps": steps}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside (compiling, evaluating, saving) is not training."""
        begin = time.perf_counter()
        yield
        self._begun += time.perf_counter() - begin

    @property
    def tokens_per_second(self) -> float:
        """Real tokens in the steady state: all intervals but the first, unless there was no other. 0 before any."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def _taken_up(self, like: Any) -> list[tuple[int, Any]]:
        """The steps that an earlier process left of this interval; none where its metrics were other ones."""
        left, self._left = self._left.get("steps", []), {}
        names, tree = [name for name, _ in _named(like)], jax.tree.structure(like)
        types = [leaf.dtype for leaf in jax.tree.leaves(like)]
        if any(sorted(found) != sorted(names) for _, found in left):
            return []
        values = [[np.asarray(found[n], t) for n, t in zip(names, types, strict=True)] for _, found in left]
        return [(step, tree.unflatten(leaves)) for (step, _), leaves in zip(left, values, strict=True)]

    def _report(self, whole: bool = True) -> list[Any]:
        """Report the interval before; gives its metrics on the host, step by step."""
        if self._late is None:
            return []
        (entries, seconds, waited), self._late = self._late, None
        earlier = [metrics for _, metrics in entries if isinstance(metrics["tokens"], np.ndarray)]  # on the host
        fetched = earlier + to_host([metrics for _, metrics in entries[len(earlier) :]])
        weight = float(sum(m["loss"].weight for m in fetched))  # of classes too, so it may be any number
        loss = float(sum(m["loss"].total for m in fetched)) / (weight or 1.0)
        tokens, last = int(sum(m["tokens"] for m in fetched)), entries[-1][0]
        self._reports += 1
        if self._reports == 2:  # the first interval tells of the speed only while there is no other
            self._tokens, self._seconds = 0, 0.0
        self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds
        skipped = {"skipped": sum(int(m["skipped"]) for m in fetched)} if "skipped" in fetched[-1] else {}
        values = {
            "step": last,
            "loss": loss,
            "lr": float(self._rate(last - 1 - int(fetched[-1].get("skipped_before", 0)))),
            "grad_norm": float(fetched[-1]["grad_norm"]),
            **skipped,
            "tokens": tokens,
            "documents": int(sum(m["documents"] for m in fetched)),
            "tokens_per_second": round(tokens / seconds, 1),
            "waiting": round(waited / seconds, 4),
            "seconds_left": round((self._steps - last) * seconds / len(entries), 1),
            **({} if whole else {"partial": True}),
        }
        for sink in self._sinks:
            sink.emit("train", values)
        self._refuse_non_finite([step for step, _ in entries], fetched)
        return fetched

    def _refuse_non_finite(self, steps: Sequence[int], fetched: Sequence[Any]) -> None:
        for step, m in zip(steps, fetched, strict=True):
            loss, norm = float(m["loss"].total), float(m["grad_norm"])
            if int(m.get("in_row", 0)) >= self._max_skipped:
                raise NonFiniteError(
                    f"step {step}: {self._max_skipped} steps in a row were skipped (the last: loss {loss}, gradient "
                    f"norm {norm}); lower optim.lr, look at the rows of these steps, or raise train.max_skipped"
                )
            if not (m.get("skipped") or (math.isfinite(loss) and math.isfinite(norm))):
                raise NonFiniteError(
                    f"step {step}: loss {loss}, gradient norm {norm}; the checkpoints before it are good: "
                    f"lower optim.lr, or look at the rows of that step"
                )


def _named(metrics: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(metrics)]
