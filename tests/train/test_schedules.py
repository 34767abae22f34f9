"""Learning rates at each step against the formulas, and how a warmup is rounded."""

import math

import pytest
from bounds import rounding

from sft_jax.config.training import OptimSection, Schedule
from sft_jax.train.optim import learning_rate, warmup_steps

STEPS, PEAK = 40, 0.5


def rates(**schedule) -> list[float]:
    """The rate of every step of a run of 40."""
    rate = learning_rate(OptimSection(lr=PEAK, schedule=schedule), STEPS)
    return [float(rate(step)) for step in range(STEPS)]


@pytest.mark.parametrize(
    ("warmup", "steps", "wanted"),
    [(0.0, 40, 0), (0.1, 40, 4), (0.1, 41, 5), (0.01, 40, 1), (0.25, 14, 4), (1, 40, 1), (7, 40, 7), (0.5, 1, 1)],
)
def test_warmup_is_a_share_rounded_up_or_a_number_of_steps(warmup: float, steps: int, wanted: int):
    """C33: a share below 1 is rounded up to steps, as transformers does; from 1 on it is a number of steps."""
    assert warmup_steps(Schedule(warmup=warmup), steps) == wanted
    assert warmup >= 1 or wanted == math.ceil(warmup * steps)


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("end", [0.0, 0.2])
def test_linear_and_cosine_after_a_linear_warmup(warmup: int, end: float):
    """C33: every rate of the run equals the formula; step 0 of a warmup has rate 0, the first after it the peak."""

    def falling(shape):
        def rate(step: int) -> float:
            done = (step - warmup) / (STEPS - warmup)
            return PEAK * (step / warmup if step < warmup else end + (1 - end) * shape(done))

        return [rate(step) for step in range(STEPS)]

    linear, cosine = falling(lambda done: 1 - done), falling(lambda done: (1 + math.cos(math.pi * done)) / 2)
    assert rates(kind="linear", warmup=warmup, end=end) == pytest.approx(linear, abs=1e-6)
    assert rates(kind="cosine", warmup=warmup, end=end) == pytest.approx(cosine, abs=1e-6)
    late = [0.0, *linear[:-1]]
    assert rates(kind="linear", warmup=warmup, end=end) != pytest.approx(late, abs=1e-3)  # off by one would be seen


def test_constant_inverse_root_and_stable_then_decay():
    """C33: the other shapes by their formulas."""
    up = [PEAK * step / 4 for step in range(4)]
    assert rates(kind="constant") == pytest.approx([PEAK] * STEPS)
    assert rates(kind="constant", warmup=4) == pytest.approx([*up, *[PEAK] * 36])
    root = [PEAK * math.sqrt(4 / step) for step in range(4, STEPS)]
    assert rates(kind="inverse_sqrt", warmup=4) == pytest.approx([*up, *root])
    fall = [PEAK * (1 - step / 8) for step in range(8)]
    assert rates(kind="wsd", warmup=4) == pytest.approx([*up, *[PEAK] * 28, *fall])


def test_a_warmup_as_long_as_the_run_only_rises():
    """C33: nothing divides by zero when no step is left after the warmup."""
    rising = [PEAK * step / 40 for step in range(STEPS)]  # of the peak, of which a part is taken away
    assert rates(kind="linear", warmup=40) == pytest.approx(rising, abs=rounding(3, PEAK))
