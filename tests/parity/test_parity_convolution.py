"""Convolution, batch normalisation and pooling equal torch's, forwards, backwards, and in what they remember."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds import rounding
from torch_reference import torch

from sft_jax.nn.convolution import BatchNorm, Conv, max_pool
from sft_jax.nn.template import Moving, Template, zeros

DRAW = np.random.default_rng(0)
KEY = jnp.zeros(2, jnp.uint32)


def first(images: np.ndarray) -> "torch.Tensor":
    """Channels last to channels first."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1))).requires_grad_()


def last(tensor) -> np.ndarray:
    """Channels first to channels last."""
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def close(ours, theirs) -> bool:
    """The same but for rounding."""
    return ours.shape == theirs.shape and np.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "stride", "padding", "groups"),
    [(3, 1, 1, 1), (3, 2, 1, 1), (7, 2, 3, 1), (1, 1, 0, 1), (1, 2, 0, 1), (4, 4, 0, 1), (3, 1, 1, 2), (2, 2, 0, 6)],
)
def test_convolution_equals_torch(size, stride, padding, groups):
    """R57: whatever the kernel, stride, padding and groups, and however we write it: values and both gradients are
    torch's in float64, within what the products that each number is a sum of may be rounded by.

    The control: a kernel that is longer by a hundredth gives others.
    """
    x, kernel = DRAW.normal(size=(2, 9, 11, 6)), DRAW.normal(size=(size, size, 6 // groups, 12))
    x, kernel = x.astype(np.float32), kernel.astype(np.float32)
    template = Template.of(Conv(6, 12, size, zeros, stride=stride, padding=padding, groups=groups, bias=True))
    bias = DRAW.normal(size=12).astype(np.float32)

    def ours(x, kernel):
        return template.bind({"kernel": kernel, "bias": bias})(x)

    found, pull = jax.vjp(ours, x, kernel)
    by = DRAW.normal(size=found.shape).astype(np.float32)
    given = x, kernel, bias, by
    exact, sizes = (
        _of_torch(*map(f, given), stride, padding, groups) for f in (np.float64, lambda a: abs(np.float64(a)))
    )
    # How many products each number is a sum of: those of a window, of the windows that see it, and of all places.
    terms = kernel[..., 0].size + 1, kernel[..., 0].size * 12 // 6, by[..., 0].size
    for mine, theirs, size, count in zip((found, *pull(jnp.asarray(by))), exact, sizes, terms, strict=True):
        assert (np.abs(mine - theirs) <= rounding(count, size)).all()
    longer = np.abs(ours(x, 1.01 * kernel) - exact[0]) / rounding(terms[0], sizes[0])
    assert np.median(longer) > 10 and longer.max() > 100


def _of_torch(x, kernel, bias, by, stride, padding, groups) -> tuple[np.ndarray, ...]:
    """A convolution, and how what is pulled by `by` pulls on images and kernel, in the type that is given."""
    there, weight = first(x), torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()).requires_grad_()
    out = torch.nn.functional.conv2d(there, weight, torch.from_numpy(bias), stride, padding, groups=groups)
    out.backward(first(by).detach())
    return last(out), last(there.grad), weight.grad.numpy().transpose(2, 3, 1, 0)


def test_batch_normalisation_equals_torch():
    """C28: three passes in training, forwards, backwards and in running statistics; then one of running statistics."""
    norm = torch.nn.BatchNorm2d(5, eps=1e-3)
    template = Template.of(BatchNorm(5, eps=1e-3))
    params = template.initial(jax.random.key(0), template.keys)
    assert template.stats == {"mean", "variance"}
    for _ in range(3):
        x = (3 + 2 * DRAW.normal(size=(4, 3, 2, 5))).astype(np.float32)
        filler = np.full((2, *x.shape[1:]), 9.0, np.float32)  # filler must not count, whatever stands in it
        real, moving = np.arange(6) < 4, {path: Moving(params[path]) for path in template.stats}

        norms = template.bind({**params, **moving})

        there = first(x)
        theirs = norm(there)
        by = DRAW.normal(size=x.shape).astype(np.float32)
        theirs.backward(first(by).detach())
        found, pull = jax.vjp(lambda x, norms=norms, f=filler, r=real: norms(jnp.concatenate([x, f]), r, KEY)[:4], x)
        assert close(found, last(theirs)) and close(pull(jnp.asarray(by))[0], last(there.grad))
        params |= {path: held.moved for path, held in moving.items()}
        assert close(params["mean"], norm.running_mean.numpy())
        assert close(params["variance"], norm.running_var.numpy())
    x = DRAW.normal(size=(2, 3, 2, 5)).astype(np.float32)
    assert close(template.bind(params)(x, jnp.ones(2, bool), KEY), last(norm.eval()(first(x))))


@pytest.mark.parametrize(("size", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (3, 1, 0), (5, 3, 2)])
def test_pooling_equals_torch(size, stride, padding):
    """R57: values and gradients, also where several of a window are the largest, and where all are below 0."""
    x = DRAW.integers(-3, 0, size=(2, 9, 11, 3)).astype(np.float32)
    there = first(x)
    theirs = torch.nn.functional.max_pool2d(there, size, stride, padding)
    found, pull = jax.vjp(lambda x: max_pool(x, size, stride, padding), x)
    assert (np.asarray(found) == last(theirs)).all()
    by = DRAW.normal(size=found.shape).astype(np.float32)
    theirs.backward(first(by).detach())
    assert close(pull(jnp.asarray(by))[0], last(there.grad))
    x[0, 4, 4, 1] = np.nan
    theirs = torch.nn.functional.max_pool2d(first(x), size, stride, padding)
    assert (np.isnan(max_pool(jnp.asarray(x), size, stride, padding)) == np.isnan(last(theirs))).all()
