"""Learning rates equal those of `transformers`' schedulers at every step."""

import numpy as np
import pytest
from torch_reference import torch, transformers
from transformers import optimization

from sft_jax.config.training import OptimSection, Schedule
from sft_jax.train.optim import learning_rate

PEAK, STEPS = 3e-4, 40


def ours(steps: int = STEPS, **schedule) -> np.ndarray:
    """Our rate at each step of a run."""
    rate = learning_rate(OptimSection(lr=PEAK, schedule=Schedule(**schedule)), steps)
    return np.asarray([float(rate(k)) for k in range(steps)])


def theirs(make, steps: int = STEPS, **arguments) -> np.ndarray:
    """The rate that each step of a torch optimizer sees."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule = make(optimizer, **arguments)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return np.asarray(rates)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal up to the rounding of float32."""
    return bool(np.allclose(a, b, rtol=1e-5, atol=1e-6 * PEAK))


@pytest.mark.parametrize("warmup", [0, 1, 7, STEPS])
@pytest.mark.parametrize(
    ("kind", "make", "needs_steps"),
    [
        ("linear", optimization.get_linear_schedule_with_warmup, True),
        ("cosine", optimization.get_cosine_schedule_with_warmup, True),
        ("constant", optimization.get_constant_schedule_with_warmup, False),
    ],
)
def test_rates_to_zero(kind, make, needs_steps, warmup):
    """C33: linear, cosine and constant rates equal those of `transformers` at each step, whatever the warmup."""
    total = {"num_training_steps": STEPS} if needs_steps else {}
    expected = theirs(make, num_warmup_steps=warmup, **total)
    found = ours(kind=kind, warmup=warmup)
    assert same(found, expected)
    if not (kind == "constant" and warmup == 0):
        assert not same(np.roll(found, 1), expected), "a schedule that is off by one must be seen"


@pytest.mark.parametrize("warmup", [0, 7])
def test_rates_to_a_share_of_the_peak(warmup):
    """C33: with `end`, linear is the polynomial schedule of power 1 and cosine the one with a smallest rate."""
    shared = {"num_warmup_steps": warmup, "num_training_steps": STEPS}
    linear = theirs(optimization.get_polynomial_decay_schedule_with_warmup, lr_end=0.1 * PEAK, power=1.0, **shared)
    cosine = theirs(optimization.get_cosine_with_min_lr_schedule_with_warmup, min_lr_rate=0.1, **shared)
    assert same(ours(kind="linear", warmup=warmup, end=0.1), linear)
    assert same(ours(kind="cosine", warmup=warmup, end=0.1), cosine)
    assert not same(linear, cosine)


@pytest.mark.parametrize("warmup", [1, 7])
def test_inverse_square_root(warmup):
    """C33: with a warmup, inverse_sqrt is that of `transformers`, whose time scale is the warmup."""
    assert same(
        ours(kind="inverse_sqrt", warmup=warmup),
        theirs(optimization.get_inverse_sqrt_schedule, num_warmup_steps=warmup),
    )


def test_inverse_square_root_without_warmup_differs():
    """C33: without a warmup our time scale is 1 step and that of `transformers` 10000, so only ours falls."""
    reference = theirs(optimization.get_inverse_sqrt_schedule, num_warmup_steps=0)
    assert same(
        ours(kind="inverse_sqrt"), theirs(optimization.get_inverse_sqrt_schedule, num_warmup_steps=0, timescale=1)
    )
    assert reference[-1] > 0.99 * PEAK


@pytest.mark.parametrize("end", [0.0, 0.1])
@pytest.mark.parametrize("warmup", [0, 7])
def test_warmup_stable_decay(warmup, end):
    """C33: wsd is `transformers`' with linear decay, but its warmup begins at 0 where theirs begins at the end rate."""
    decay = 10
    reference = theirs(
        optimization.get_wsd_schedule,
        num_warmup_steps=warmup,
        num_decay_steps=decay,
        num_training_steps=STEPS,
        decay_type="linear",
        min_lr_ratio=end,
    )
    found = ours(kind="wsd", warmup=warmup, end=end, decay=decay / STEPS)
    assert same(found[warmup:], reference[warmup:])
    assert same(found[:warmup], np.arange(warmup) / max(1, warmup) * PEAK)
    assert same(found[:warmup], reference[:warmup]) == (end == 0 or warmup == 0)
    assert same(found[warmup : STEPS - decay + 1], np.full(STEPS - decay + 1 - warmup, PEAK))


@pytest.mark.parametrize("share", [0.06, 0.07, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("steps", [3, 50, 100, 777])
def test_warmup_as_a_share_of_the_steps(share, steps):
    """C33: a warmup below 1 is a share of the steps, rounded up as `TrainingArguments` rounds its own."""
    count = transformers.TrainingArguments(warmup_steps=share, report_to=[]).get_warmup_steps(steps)
    expected = theirs(
        optimization.get_linear_schedule_with_warmup, steps, num_warmup_steps=count, num_training_steps=steps
    )
    assert same(ours(steps, kind="linear", warmup=share), expected)
