"""Gradients of the mean cross-entropy equal those of `transformers`, parameter by parameter."""

import jax
import numpy as np
import pytest
from torch_reference import (
    FAMILIES,
    TOLERANCE,
    documents,
    one_a_row,
    paired,
    reference_model,
    several_a_row,
    torch,
    torch_batch,
)

from sft_jax.tasks.losses import cross_entropy
from sft_jax.weights.table import save


def our_gradients(pair, batch) -> dict[str, np.ndarray]:
    """Gradients under the names of the reference; totals divided once by the weight, as the training step does."""

    def total(params):
        found = cross_entropy(pair.model.template.bind(params)(batch), batch["label"], batch["weight"])
        return found.total, found.weight

    gradients, weight = jax.jit(jax.grad(total, has_aux=True))(pair.params)
    return save(pair.model.table, {path: np.asarray(g / weight) for path, g in gradients.items()})


def torch_gradients(reference, encoded) -> dict[str, np.ndarray]:
    """Gradients of the loss that `transformers` computes itself."""
    reference.zero_grad()
    labels = torch.from_numpy(encoded.documents["label"].astype(np.int64))
    reference(**torch_batch(reference, encoded), labels=labels).loss.backward()
    return {name: parameter.grad.numpy() for name, parameter in reference.named_parameters()}


def differing(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, float]:
    """Relative difference of each gradient that differs by more than the tolerance.

    The bias of the keys has gradient 0 but for rounding, hence the small share of the whole gradient's norm.
    """
    assert ours.keys() == theirs.keys()
    whole = np.sqrt(sum(np.square(g.astype(np.float64)).sum() for g in theirs.values()))
    gaps = {n: np.linalg.norm(ours[n] - theirs[n]) / (np.linalg.norm(theirs[n]) + 1e-3 * whole) for n in theirs}
    return {name: float(gap) for name, gap in gaps.items() if not gap < TOLERANCE}


@pytest.mark.parametrize("layout", [one_a_row, several_a_row])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_equal_the_reference(name, layout, tmp_path):
    """C3 R17: on padded and on packed rows the gradient of every parameter agrees within 1e-4 of its norm."""
    pair = paired(reference_model(name), tmp_path)
    encoded = documents(pair.reference, 12)
    theirs = torch_gradients(pair.reference, encoded)
    assert not differing(our_gradients(pair, layout(encoded)), theirs)


def test_the_comparison_sees_a_leak_between_documents(tmp_path):
    """C3: negative control: with the documents of a row merged into one, the gradients differ."""
    pair = paired(reference_model("bert"), tmp_path)
    encoded = documents(pair.reference, 12)
    batch = several_a_row(encoded)
    merged = {**batch, "segment_ids": np.minimum(batch["segment_ids"], 1)}
    assert len(differing(our_gradients(pair, merged), torch_gradients(pair.reference, encoded))) > 10
