"""Gradients of the mean cross-entropy equal those of `transformers`, parameter by parameter."""

import jax
import numpy as np
import pytest
from torch_reference import (
    CASES,
    DECODERS,
    FAMILIES,
    TOLERANCE,
    dense,
    documents,
    in_order,
    one_a_row,
    paired,
    reference_model,
    several_a_row,
    torch,
    torch_batch,
    torch_logits,
    torch_outputs,
)

from sft_jax.tasks.losses import cross_entropy
from sft_jax.weights.table import save

TOKEN_HEADS = [
    *((name, "causal_lm") for name in (*DECODERS, "llama-tied-biases", "phi3-longrope")),
    *(("bert", kind) for kind in ("token_classification", "question_answering")),
    *((name, "token_classification") for name in ("gpt2", "llama")),
]


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


def gaps(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, float]:
    """Relative difference of each gradient.

    The bias of the keys has gradient 0 but for rounding, hence the small share of the whole gradient's norm.
    """
    assert ours.keys() == theirs.keys()
    whole = np.sqrt(sum(np.square(g.astype(np.float64)).sum() for g in theirs.values()))
    found = {n: np.linalg.norm(ours[n] - theirs[n]) / (np.linalg.norm(theirs[n]) + 1e-3 * whole) for n in theirs}
    return {name: float(gap) for name, gap in found.items()}


def worst(*found: dict[str, float]) -> float:
    """The largest of all."""
    return max(gap for each in found for gap in each.values())


def our_pull(pair, batch, pull) -> dict[str, np.ndarray]:
    """Gradients of the sum of all logits, each times its number in `pull`, under the names of the reference."""

    def total(params):
        outputs = dense(pair.model.template.bind(params)(batch))
        return (in_order(outputs, batch, pair.model.head.kind) * pull).sum()

    gradients = jax.jit(jax.grad(total))(pair.params)
    return save(pair.model.table, {path: np.asarray(g) for path, g in gradients.items()})


def torch_pull(reference, encoded, pull) -> dict[str, np.ndarray]:
    """The same of the reference."""
    reference.zero_grad()
    (torch_outputs(reference, encoded) * torch.from_numpy(pull)).sum().backward()
    return {name: parameter.grad.numpy() for name, parameter in reference.named_parameters()}


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_equal_the_reference(name, tmp_path, record_property):
    """C3 R17: on padded and on packed rows the gradient of every parameter agrees within 1e-4 of its norm."""
    pair = paired(reference_model(name), tmp_path)
    encoded = documents(pair.reference, 12)
    theirs = torch_gradients(pair.reference, encoded)
    found = [gaps(our_gradients(pair, layout(encoded)), theirs) for layout in (one_a_row, several_a_row)]
    record_property("parity", f"{CASES[name][0]}|sequence_classification|gradients|{worst(*found):.1e}")
    assert worst(*found) < TOLERANCE, found


@pytest.mark.parametrize(("name", "kind"), TOKEN_HEADS)
def test_gradients_through_heads_on_tokens_equal_the_reference(name, kind, tmp_path, record_property):
    """C3 R17 C31: so do those of heads on tokens and on the vocabulary, tied or not, whatever pulls on their logits."""
    pair = paired(reference_model(name, kind), tmp_path)
    encoded = documents(pair.reference, 8)
    shape = torch_logits(pair.reference, encoded).shape
    pull = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    theirs = torch_pull(pair.reference, encoded, pull)
    found = [gaps(our_pull(pair, layout(encoded), pull), theirs) for layout in (one_a_row, several_a_row)]
    record_property("parity", f"{CASES[name][0]}|{kind}|gradients|{worst(*found):.1e}")
    assert worst(*found) < TOLERANCE, found


def test_the_comparison_sees_a_leak_between_documents(tmp_path):
    """C3: negative control: with the documents of a row merged into one, the gradients differ."""
    pair = paired(reference_model("bert"), tmp_path)
    encoded = documents(pair.reference, 12)
    batch = several_a_row(encoded)
    merged = {**batch, "segment_ids": np.minimum(batch["segment_ids"], 1)}
    found = gaps(our_gradients(pair, merged), torch_gradients(pair.reference, encoded))
    assert sum(gap > TOLERANCE for gap in found.values()) > 10
