"""Encoder-decoders equal those of `transformers`: logits, gradients, twenty steps, and what is written back."""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from torch_reference import TOLERANCE, gap, rounded, torch, transformers
from twenty_steps import CLIP, STEPS, apart, our_losses, torch_losses

from sft_jax.config.tasks import Seq2Seq
from sft_jax.data.batch import Batch, Encoded, Shape, collate, lay_out
from sft_jax.data.loader import TrainBatches
from sft_jax.data.order import Order
from sft_jax.errors import ModelError
from sft_jax.export import About, export_model
from sft_jax.models.encoder_decoder import sinusoids
from sft_jax.models.family import Head, Model, build_model, load_model, settled
from sft_jax.nn.heads import LazyLogits
from sft_jax.tasks.task import build_task
from sft_jax.weights.files import open_checkpoint, write_checkpoint
from sft_jax.weights.table import save

LONGEST, ANSWER = 19, 13  # tokens of a source and of a target at most
MARIAN = {
    "vocab_size": 53,
    "d_model": 20,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 5,
    "decoder_attention_heads": 5,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 31,
    "max_position_embeddings": 23,
    "activation_function": "swish",
    "scale_embedding": True,
    "static_position_embeddings": True,
    "pad_token_id": 52,
    "decoder_start_token_id": 52,
    "eos_token_id": 1,
    "forced_eos_token_id": 1,
}
T5 = {
    "vocab_size": 53,
    "d_model": 20,
    "d_kv": 6,
    "d_ff": 37,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 5,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 11,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
# Name -> (family, what its configuration says). Sizes are odd on purpose: no two of them agree by chance.
CASES: dict[str, tuple[str, dict]] = {
    "marian": ("marian", MARIAN),
    "marian-odd-relu": (
        "marian",
        {**MARIAN, "d_model": 21, "activation_function": "relu", "scale_embedding": False, "encoder_layers": 1}
        | {"encoder_attention_heads": 3, "decoder_attention_heads": 3},
    ),
    "t5": ("t5", T5),
    "t5-gated": ("t5", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5-gated-silu": ("t5", {**T5, "feed_forward_proj": "gated-silu", "relative_attention_num_buckets": 13}),
}
# Helsinki-NLP/opus-mt-en-fr and google-t5/t5-small.
PUBLISHED = {
    "marian": {
        **MARIAN,
        "vocab_size": 59514,
        "pad_token_id": 59513,
        "decoder_start_token_id": 59513,
        "eos_token_id": 0,
        "d_model": 512,
        **dict.fromkeys(("encoder_layers", "decoder_layers"), 6),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 8),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 2048),
        "max_position_embeddings": 512,
    },
    "t5": {"vocab_size": 32128, "decoder_start_token_id": 0},
}
RATES = ("dropout", "attention_dropout", "activation_dropout", "dropout_rate")


@dataclasses.dataclass(frozen=True)
class Pair:
    """A reference and ours, with the numbers that ours loaded from the directory that the reference was saved to."""

    reference: Any
    model: Model
    params: dict[str, np.ndarray]
    directory: Path


def reference_model(family: str, settings: dict, spread: float = 0.3, seed: int = 0) -> Any:
    """A reference without dropout, with noise of this spread on every parameter and on the bias of the logits."""
    known = {name: 0.0 for name in RATES if hasattr(transformers.AutoConfig.for_model(family), name)}
    config = transformers.AutoConfig.for_model(family, **settings, **known)
    torch.manual_seed(seed)
    reference = transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager")
    if settings.get("tie_word_embeddings", True) is False:  # `transformers` ties them whatever is said, until it loads
        reference.lm_head.weight = torch.nn.Parameter(0.2 * torch.randn(reference.lm_head.weight.shape))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, values in [*reference.named_parameters(), *reference.named_buffers()]:
            if "embed_positions" not in name:
                values.add_(spread * torch.randn(values.shape, generator=generator))
    return reference.eval()


def loaded(directory: Path) -> tuple[Model, dict[str, np.ndarray]]:
    """Our model and its parameters from a directory; nothing may be missing."""
    head = Head("seq2seq", 0)
    checkpoint = settled(open_checkpoint(directory), head)
    model = build_model(checkpoint.config, head, str(directory))
    matched, params = load_model(model, checkpoint)
    assert not matched.initialised
    return model, params


def paired(name: str, directory: Path, spread: float = 0.3) -> Pair:
    """A random reference of a case on disk, and ours from there."""
    reference = reference_model(*CASES[name], spread)
    reference.save_pretrained(directory)
    return Pair(reference, *loaded(directory), directory)


def documents(config: Any, count: int, seed: int = 0, longest: int = LONGEST, answer: int = ANSWER) -> Encoded:
    """Ragged sources with ragged targets of random tokens, none of them the padding id; some targets weigh nothing."""
    draw = np.random.default_rng(seed)
    lengths, answers = draw.integers(1, longest + 1, count), draw.integers(1, answer + 1, count)
    lengths[:2], answers[:2] = (1, longest), (answer, 1)
    usable = np.setdiff1d(np.arange(config.vocab_size), [config.pad_token_id])
    ids, label = (draw.choice(usable, size.sum()).astype(np.int32) for size in (lengths, answers))
    ends = np.cumsum(answers)
    shifted = np.concatenate([[0], label[:-1]]).astype(np.int32)
    shifted[np.concatenate([[0], ends[:-1]])] = config.decoder_start_token_id
    tokens = {"decoder_input_ids": shifted, "label": label, "token_weight": np.ones(len(label), np.float32)}
    target = Encoded(tokens, np.concatenate([[0], ends]), {})
    return Encoded({"input_ids": ids}, np.concatenate([[0], np.cumsum(lengths)]), {}, target=target)


def one_a_row(encoded: Encoded) -> Batch:
    """Every document in a row of its own, padded, and a row of filler at the end."""
    shape = Shape(len(encoded) + 1, int(encoded.lengths.max()) + 2, 1, int(encoded.target.lengths.max()) + 3)
    return collate(encoded, [[i] for i in range(len(encoded))], shape)


def several_a_row(encoded: Encoded) -> Batch:
    """The documents packed, and a row of filler at the end."""
    shape = Shape(len(encoded), 2 * LONGEST + 1, 5, 2 * ANSWER + 3)
    rows = lay_out(encoded, np.arange(len(encoded)), shape)
    assert max(map(len, rows)) > 2, "no row holds several documents: this would test nothing"
    return collate(encoded, rows, shape._replace(rows=len(rows) + 1))


def in_order(outputs: Any, batch: Batch) -> Any:
    """What a model makes of a batch, by token of the targets in the order of the documents, without filler."""
    rows, places = np.nonzero(batch["decoder_segment_ids"])
    document = batch["index"][rows, batch["decoder_segment_ids"][rows, places] - 1]
    dense = outputs.dense() if isinstance(outputs, LazyLogits) else outputs
    return dense[rows, places][np.lexsort((batch["decoder_position_ids"][rows, places], document))]


def our_logits(pair: Pair, batch: Batch) -> np.ndarray:
    """Logits of the tokens of the targets in order."""
    run = jax.jit(lambda params, batch: pair.model.template.bind(params)(batch).dense())
    return np.asarray(in_order(run(pair.params, batch), batch))


def torch_outputs(reference: Any, encoded: Encoded, chosen: Any = None) -> Any:
    """The same of the reference, on padded rows."""
    chosen = range(len(encoded)) if chosen is None else chosen
    sides = []
    for part, name in ((encoded, "input_ids"), (encoded.target, "decoder_input_ids")):
        width = int(max(part.lengths[list(chosen)]))
        ids = np.full((len(chosen), width), reference.config.pad_token_id, np.int64)
        mask = np.zeros_like(ids)
        for row, document in enumerate(chosen):
            length = part.lengths[document]
            ids[row, :length], mask[row, :length] = part.tokens[name][part.places([document])], 1
        sides.append((torch.from_numpy(ids), torch.from_numpy(mask)))
    (ids, mask), (answers, answer_mask) = sides
    found = reference(input_ids=ids, attention_mask=mask, decoder_input_ids=answers, use_cache=False)
    return found.logits[answer_mask > 0]


def torch_logits(reference: Any, encoded: Encoded) -> np.ndarray:
    """The same as an array."""
    with torch.no_grad():
        return torch_outputs(reference, encoded).numpy()


@pytest.mark.parametrize("settings", [{}, {"scale_decoder_outputs": False}], ids=["scaled", "plain"])
def test_a_head_of_its_own_beside_a_flag_that_ties_it(settings, tmp_path):
    """Fault D: T5 keeps a head with numbers of its own, and scales before it or not as the file says."""
    reference = reference_model("t5", {**T5, **settings})
    reference.lm_head.weight = torch.nn.Parameter(0.2 * torch.randn(reference.lm_head.weight.shape))
    reference.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, "tie_word_embeddings": True}))
    there = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert not torch.equal(there.lm_head.weight, there.shared.weight)
    encoded = documents(there.config, 6)
    pair = Pair(there, *loaded(tmp_path), tmp_path)
    assert gap(our_logits(pair, one_a_row(encoded)), torch_logits(there, encoded)) < TOLERANCE


@pytest.mark.parametrize(("name", "tensor"), [
    ("t5", "decoder.embed_tokens.weight"),
    ("marian", "lm_head.weight"),
    ("marian", "model.encoder.embed_positions.weight"),
])  # fmt: skip
def test_what_is_only_a_copy_must_be_one(name, tensor, tmp_path):
    """Fault D: a copy of the embeddings, or a table of sinusoids, that holds other numbers is refused by name."""
    pair = paired(name, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    tensors = {key: checkpoint.read(key) for key in checkpoint.shapes}
    words = tensors["shared.weight" if name == "t5" else "model.shared.weight"]
    table = sinusoids(23, 20) if "positions" in tensor else words
    write_checkpoint(tmp_path, checkpoint.config, {**tensors, tensor: table})
    assert settled(open_checkpoint(tmp_path), pair.model.head).remarks == ()
    write_checkpoint(tmp_path, checkpoint.config, {**tensors, tensor: np.ascontiguousarray(table[::-1])})
    with pytest.raises(ModelError, match=f"{tensor}: expected "):
        settled(open_checkpoint(tmp_path), pair.model.head)


@pytest.mark.parametrize("name", CASES)
def test_logits_of_padded_and_packed_pairs_equal_the_reference(name, tmp_path, record_property):
    """C3 R17 R57: padded or packed, a token of a target has the logits of `transformers`, but for rounding."""
    pair = paired(name, tmp_path)
    encoded = documents(pair.reference.config, 12)
    expected = torch_logits(pair.reference, encoded)
    assert expected.std() > 0.1, "logits that hardly vary would agree whatever is computed"
    gaps = [gap(our_logits(pair, layout(encoded)), expected) for layout in (one_a_row, several_a_row)]
    record_property("parity", f"{CASES[name][0]}|seq2seq|logits|{max(gaps):.1e}")
    assert max(gaps) < rounded(pair.reference, lambda reference: torch_logits(reference, encoded), gap)


def torch_gradients(reference: Any, encoded: Encoded, pull: np.ndarray) -> dict[str, np.ndarray]:
    """The reference's gradients of the sum of all logits, each times its number in `pull`."""
    reference.zero_grad()
    (torch_outputs(reference, encoded) * torch.from_numpy(pull)).sum().backward()
    return {n: p.grad.numpy() for n, p in reference.named_parameters() if p.grad is not None}


def norm(gradients: dict[str, np.ndarray]) -> float:
    """The Euclidean norm over all leaves."""
    return sum(float(np.square(np.float64(g)).sum()) for g in gradients.values()) ** 0.5


def distance(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Norm of the difference by that of all gradients: what is a thousandth of them is seen, and no noise is compared.

    Attention that is nearly sure of itself has gradients of queries and keys that are small differences.
    """
    return norm({name: ours[name] - theirs[name] for name in theirs}) / norm(theirs)


def furthest(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """The largest relative difference of a gradient; one of nearly nothing is measured by all of them."""
    whole = norm(theirs)
    return max(float(np.linalg.norm(ours[n] - g) / (np.linalg.norm(g) + 1e-3 * whole)) for n, g in theirs.items())


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_the_reference(name, tmp_path, record_property):
    """C3 R17 C31: on padded and packed rows the gradient of every parameter agrees but for rounding.

    Embeddings that both sides and the head share take the gradients of all; the bias of Marian's logits has none.
    """
    pair = paired(name, tmp_path)
    encoded = documents(pair.reference.config, 8)
    pull = np.random.default_rng(0).normal(size=torch_logits(pair.reference, encoded).shape).astype(np.float32)
    theirs, worst = torch_gradients(pair.reference, encoded, pull), 0.0
    allowed = rounded(pair.reference, lambda reference: torch_gradients(reference, encoded, pull), distance)
    for layout in (one_a_row, several_a_row):
        batch = layout(encoded)
        trained = {p: a for p, a in pair.params.items() if p not in pair.model.template.stats}
        fixed = {p: a for p, a in pair.params.items() if p in pair.model.template.stats}

        def total(params, batch=batch, fixed=fixed):
            return (in_order(pair.model.template.bind({**params, **fixed})(batch), batch) * pull).sum()

        found = jax.jit(jax.grad(total))(trained)
        ours = save(pair.model.table, {p: np.asarray(a) for p, a in {**fixed, **found}.items()})
        ours.pop("final_logits_bias", None)
        assert ours.keys() == theirs.keys()
        worst = max(worst, furthest(ours, theirs))
        assert distance(ours, theirs) < allowed < 1e-2
    record_property("parity", f"{CASES[name][0]}|seq2seq|gradients|{worst:.1e}")


@pytest.mark.parametrize("spoil", ["positions", "decoder positions", "segments", "decoder segments", "source"])
@pytest.mark.parametrize("name", ["marian", "t5"])
def test_the_comparison_sees_a_wrong_input(name, spoil, tmp_path):
    """C3: negative control: running positions, merged documents and a source beside its target are seen.

    Distances are relative: where documents are apart, it does not matter where each begins to count.
    """
    pair = paired(name, tmp_path)
    encoded = documents(pair.reference.config, 12)
    batch = several_a_row(encoded)
    changed = {
        "positions": {"position_ids": np.roll(batch["position_ids"], 1, axis=1)},
        "decoder positions": {"decoder_position_ids": np.minimum(batch["decoder_position_ids"], 3)},
        "segments": {"segment_ids": np.minimum(batch["segment_ids"], 1)},
        "decoder segments": {"decoder_segment_ids": np.minimum(batch["decoder_segment_ids"], 1)},
        "source": {"segment_ids": np.roll(batch["segment_ids"], 1, axis=1)},
    }[spoil]
    run = jax.jit(lambda params, batch: pair.model.template.bind(params)(batch).dense())
    found = np.asarray(in_order(run(pair.params, {**batch, **changed}), batch))
    assert gap(found, torch_logits(pair.reference, encoded)) > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["marian", "t5", "t5-gated"])
def test_the_comparison_sees_every_parameter(name, tmp_path):
    """R57: negative control: another value in any one parameter changes the logits, so none is loaded by chance."""
    pair = paired(name, tmp_path)
    encoded = documents(pair.reference.config, 4)
    batch, expected = one_a_row(encoded), torch_logits(pair.reference, encoded)
    seen = 100 * rounded(pair.reference, lambda reference: torch_logits(reference, encoded), gap)
    run = jax.jit(lambda params, batch: pair.model.template.bind(params)(batch).dense())
    for path, array in pair.params.items():
        noise = np.random.default_rng(0).normal(size=array.shape).astype(np.float32)
        found = np.asarray(in_order(run({**pair.params, path: array + noise}, batch), batch))
        # The bias of the keys adds one number to all scores of a query, which the softmax takes away again.
        assert (gap(found, expected) > seen) != path.endswith("/k/bias"), path


@pytest.mark.parametrize("family", PUBLISHED)
def test_logits_at_the_published_size(family, record_property):
    """R57: at the published size (random weights) the logits of two pairs agree but for rounding."""
    with tempfile.TemporaryDirectory() as directory:  # not to be kept as pytest keeps tmp_path
        reference = reference_model(family, PUBLISHED[family], 0.02)
        reference.save_pretrained(directory)
        pair = Pair(reference, *loaded(Path(directory)), Path(directory))
        counted = sum(p.numel() for p in reference.parameters() if p.requires_grad)
        assert sum(a.size for p, a in pair.params.items() if p not in pair.model.template.stats) == counted
        encoded = documents(reference.config, 2, longest=16, answer=9)
        expected = torch_logits(reference, encoded)
        found = gap(our_logits(pair, one_a_row(encoded)), expected)
        allowed = rounded(reference, lambda reference: torch_logits(reference, encoded), gap)
    record_property("parity", f"{family}|seq2seq|published|{found:.1e}")
    assert expected.std() > 0.01
    assert found < allowed


@pytest.mark.parametrize(("name", "smoothing"), [("marian", 0.0), ("t5", 0.0), ("t5-gated", 0.1)])
def test_twenty_steps_follow_torch(name, smoothing, tmp_path, record_property):
    """C33 R17: the loss of each of 20 steps on packed pairs agrees with torch's on padded ones within 1e-4.

    The bias of Marian's logits stays as it is, as it does there.
    """
    pair = paired(name, tmp_path, 0.1)
    reference, encoded = pair.reference.train(), documents(pair.reference.config, 20)
    batches = TrainBatches(encoded, Order(20, 6, seed=1), (Shape(6, 2 * LONGEST, 4, 2 * ANSWER),), STEPS)
    assert batches[0]["decoder_segment_ids"].max() > 1 and (batches[3]["index"] >= 0).sum() < 6
    mean = torch.nn.CrossEntropyLoss(label_smoothing=smoothing)

    def loss(chosen: np.ndarray) -> Any:
        label = np.concatenate([encoded.target.tokens["label"][encoded.target.places([d])] for d in chosen])
        return mean(torch_outputs(reference, encoded, chosen), torch.from_numpy(label.astype(np.int64)))

    task = build_task(Seq2Seq(kind="seq2seq", label_smoothing=smoothing), {})
    ours, our_norms = our_losses(pair.model, pair.params, task, batches)
    theirs, their_norms = torch_losses(reference, batches, loss)
    if not smoothing:
        record_property("parity", f"{CASES[name][0]}|seq2seq|trajectory|{apart(ours, theirs):.1e}")
    assert their_norms.max() > 2 * CLIP and theirs[-4:].mean() < 0.95 * theirs[:4].mean()
    assert apart(ours, theirs) < TOLERANCE
    assert apart(our_norms, their_norms) < 10 * TOLERANCE


@pytest.mark.parametrize("name", ["marian", "t5", "t5-gated"])
def test_exports_read_back_in_transformers(name, tmp_path, record_property):
    """R57 C31: what is exported loads in `transformers` with nothing missing, left over or other; ours reads it too."""
    from translations import write_marian, write_t5

    pair = paired(name, tmp_path / "source")
    made = write_marian if name == "marian" else write_t5
    tokenizer = made(tmp_path / "tokenizer")
    task = build_task(Seq2Seq(kind="seq2seq"), {})
    config = open_checkpoint(pair.directory).config
    export_model(tmp_path / "out", pair.model, pair.params, About(config, task, tokenizer, 24, "a card"))
    again, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    encoded = documents(pair.reference.config, 6)
    found = gap(torch_logits(again.eval(), encoded), torch_logits(pair.reference, encoded))
    record_property("parity", f"{CASES[name][0]}|seq2seq|reload|{found:.1e}")
    assert found < 1e-6
    assert loaded(tmp_path / "out")[1].keys() == pair.params.keys()
