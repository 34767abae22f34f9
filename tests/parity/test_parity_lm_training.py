"""Twenty steps of causal language modelling follow torch's: answers alone supervised, packed here and padded there."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from torch_reference import TOLERANCE, torch, transformers
from transformers import get_linear_schedule_with_warmup

from sft_jax.config.schema import MeshSection
from sft_jax.config.tasks import CausalLM
from sft_jax.config.training import OptimSection, Schedule, TrainSection
from sft_jax.data.batch import Encoded, Shape
from sft_jax.data.loader import TrainBatches
from sft_jax.data.order import Order
from sft_jax.mesh import batch_sharding, make_mesh, put
from sft_jax.models.family import build_model, load_model
from sft_jax.tasks.task import build_task
from sft_jax.train.optim import build_optimizer
from sft_jax.train.state import beginning, initial_state, place
from sft_jax.train.step import make_train_step, train_program
from sft_jax.weights.files import open_checkpoint

STEPS, WARMUP, RATE, DECAY, CLIP, LONGEST, VOCABULARY = 20, 4, 5e-3, 0.5, 1.0, 19, 53
SECTION = OptimSection(lr=RATE, weight_decay=DECAY, clip=CLIP, schedule=Schedule(kind="linear", warmup=WARMUP))
SETTINGS = {"kind": "causal_lm", "format": "completion"}
# Family -> what its configuration says. Sizes are odd on purpose; GPT-2's embeddings are tied, Llama's are not.
CASES = {
    "gpt2": {
        "n_embd": 20,
        "n_head": 5,
        "n_layer": 2,
        "n_positions": LONGEST + 4,
        **dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0),
    },
    "llama": {
        "hidden_size": 24,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 37,
        "max_position_embeddings": LONGEST + 4,
        "tie_word_embeddings": False,
    },
}


def reference_model(name: str, directory: Path) -> "torch.nn.Module":
    """A random model of the family with a head on its vocabulary, saved too."""
    config = transformers.AutoConfig.for_model(name, vocab_size=VOCABULARY, pad_token_id=0, **CASES[name])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: at 0 and 1 a mistake would not be seen
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(str(directory))
    return model


def documents(count: int, seed: int = 0) -> Encoded:
    """Ragged documents of random tokens, the last part of each supervised."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(3, LONGEST + 1, size=count)
    ids = [draw.integers(1, VOCABULARY, size=n).astype(np.int32) for n in lengths]
    weights = [(np.arange(n) >= draw.integers(0, n - 1)).astype(np.float32) for n in lengths]
    for weight in weights:
        weight[-1] = 0
    tokens = {
        "input_ids": np.concatenate(ids),
        "label": np.concatenate([np.append(one[1:], 0) for one in ids]).astype(np.int32),
        "token_weight": np.concatenate(weights),
    }
    return Encoded(tokens, np.concatenate([[0], np.cumsum(lengths)]), {})


def our_losses(directory: Path, batches: TrainBatches, smoothing: float) -> tuple[np.ndarray, np.ndarray]:
    """(loss, gradient norm) of every step, by the training step of a run."""
    task = build_task(CausalLM(**SETTINGS, label_smoothing=smoothing), {})
    checkpoint = open_checkpoint(directory)
    model, mesh = build_model(checkpoint.config, task.head, "here"), make_mesh(MeshSection(data=1))
    matched, params = load_model(model, checkpoint)
    assert not matched.initialised
    paths, section = model.template.keys, TrainSection()
    optimizer = build_optimizer(SECTION, STEPS, paths)
    begin = beginning(optimizer, section)
    placement = place(mesh, model.template, model.table.axes, paths, begin)
    state, frozen = initial_state(model.template, params, frozenset(), begin, placement, 0, jnp.dtype("float32"))
    settings = {"section": section, "compute_dtype": jnp.dtype("float32"), "seed": 0}
    program = train_program(make_train_step(model.template, task, optimizer, **settings), placement, state, frozen)
    found = []
    for number in range(len(batches)):
        batch = batches[number]
        state, metrics = program.compile(batch)(state, frozen, put(batch, batch_sharding(mesh)))
        found.append((float(metrics["loss"].value), float(metrics["grad_norm"])))
    losses, norms = np.asarray(found).T
    return losses, norms


def torch_losses(model, encoded: Encoded, batches: TrainBatches, smoothing: float) -> tuple[np.ndarray, np.ndarray]:
    """The same of a plain torch loop on the documents that our batches name, each in a padded row of its own."""
    named = list(model.named_parameters())
    exempt = [n.endswith("bias") or "norm" in n or "ln_" in n for n, _ in named]
    groups = [
        {"params": [p for (_, p), out in zip(named, exempt, strict=True) if out == side], "weight_decay": decay}
        for side, decay in ((False, DECAY), (True, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    schedule = get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=smoothing)
    found = []
    for number in range(len(batches)):
        index = batches[number]["index"]
        chosen = index[index >= 0]
        ids, mask, labels = (np.full((len(chosen), LONGEST), fill, np.int64) for fill in (0, 0, -100))
        for row, document in enumerate(chosen):
            span = slice(*encoded.offsets[document : document + 2])
            width = span.stop - span.start
            ids[row, :width], mask[row, :width] = encoded.tokens["input_ids"][span], 1
            learned = encoded.tokens["token_weight"][span][:-1] > 0
            labels[row, 1:width][learned] = ids[row, 1:width][learned]
        given = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        logits = model(**given).logits[:, :-1].reshape(-1, VOCABULARY)
        loss = loss_of(logits, torch.from_numpy(labels[:, 1:]).reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP))
        optimizer.step()
        schedule.step()
        found.append((float(loss.detach()), norm))
    losses, norms = np.asarray(found).T
    return losses, norms


@pytest.mark.parametrize(("name", "smoothing"), [("gpt2", 0.0), ("llama", 0.0), ("gpt2", 0.1)])
def test_twenty_steps_of_a_language_model_follow_torch(name, smoothing, tmp_path, record_property):
    """C33, R17: the loss of each of 20 steps on packed answers agrees with torch's on padded ones within 1e-4."""
    model = reference_model(name, tmp_path)
    encoded = documents(20)
    batches = TrainBatches(encoded, Order(len(encoded), 6, seed=1), (Shape(6, 2 * LONGEST, 4),), STEPS)
    assert batches[0]["segment_ids"].max() > 1 and (batches[3]["index"] >= 0).sum() < 6, "packed, and a short batch"
    ours, our_norms = our_losses(tmp_path, batches, smoothing)
    theirs, their_norms = torch_losses(model, encoded, batches, smoothing)
    error = float(np.abs(ours / theirs - 1).max())
    if not smoothing:
        record_property("parity", f"{name}|causal_lm|trajectory|{error:.1e}")
    assert their_norms.max() > 2 * CLIP and theirs[-4:].mean() < 0.9 * theirs[:4].mean()
    assert error < TOLERANCE
    assert np.abs(our_norms / their_norms - 1).max() < 10 * TOLERANCE


def test_the_comparison_sees_an_unsupervised_token(tmp_path):
    """C4: negative control: one document whose prompt is supervised too leaves the trajectory."""
    model = reference_model("llama", tmp_path)
    encoded = documents(20)
    batches = TrainBatches(encoded, Order(len(encoded), 6, seed=1), (Shape(6, 2 * LONGEST, 4),), 2)
    theirs, _ = torch_losses(model, encoded, batches, 0.0)
    document = int(batches[1]["index"].max())
    encoded.tokens["token_weight"][encoded.offsets[document] : encoded.offsets[document + 1] - 1] = 1
    ours, _ = our_losses(tmp_path, batches, 0.0)
    assert np.abs(ours / theirs - 1).max() > 10 * TOLERANCE
