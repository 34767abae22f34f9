"""Image classifiers equal those of `transformers`: logits, gradients, and what an export reads back as."""

import dataclasses
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from image_reference import (
    CASES,
    DEEP,
    KIND,
    images,
    one_a_row,
    pair_of,
    torch_batch,
    torch_logits,
    with_statistics,
)
from test_parity_gradients import gaps, worst
from torch_reference import TOLERANCE, Pair, gap, paired, randomised, rounded, torch, transformers

from sft_jax.models.family import Head, build_model, load_model
from sft_jax.nn.template import Moving
from sft_jax.tasks.losses import cross_entropy
from sft_jax.weights.files import open_checkpoint, write_checkpoint
from sft_jax.weights.table import save

PUBLISHED = {
    "resnet": {},
    "vit": {},
}  # microsoft/resnet-50, google/vit-base-patch16-224: what `transformers` begins with


def our_logits(pair: Pair, batch) -> np.ndarray:
    """Logits by document."""
    return np.asarray(pair.forward(pair.params, batch))[batch["index"] >= 0]


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_reference(name, tmp_path, record_property):
    """C28 R57: an image has the logits that `transformers` gives it but for rounding, its statistics those on disk."""
    pair = pair_of(name, tmp_path)
    encoded = images(pair.reference, 5)
    expected = torch_logits(pair.reference, encoded)
    assert expected.std() > 0.1, "logits that hardly vary would agree whatever is computed"
    found = gap(our_logits(pair, one_a_row(encoded)), expected)
    record_property("parity", f"{CASES[name][0]}|{KIND}|logits|{found:.1e}")
    assert found < rounded(pair.reference, lambda reference: torch_logits(reference, encoded), gap)


@pytest.mark.parametrize("name", ["resnet", "vit", "dinov2-swiglu-no-mask"])
@pytest.mark.parametrize("size", [(30, 58), (64, 64)])
def test_images_of_another_size_equal_the_reference(name, size, tmp_path):
    """R57: so has one of another size, not square either, whose positions are interpolated as `transformers` does."""
    pair = pair_of(name, tmp_path)
    encoded = images(pair.reference, 2, size)
    assert gap(our_logits(pair, one_a_row(encoded)), torch_logits(pair.reference, encoded)) < TOLERANCE


@pytest.mark.parametrize("name", DEEP)
def test_the_comparison_sees_every_parameter(name, tmp_path):
    """R57: negative control: another value in any one parameter or statistic changes the logits, but for two kinds."""
    pair = pair_of(name, tmp_path)
    encoded = images(pair.reference, 3)
    batch, expected = one_a_row(encoded), torch_logits(pair.reference, encoded)
    for path, array in pair.params.items():
        noise = np.random.default_rng(0).uniform(0.5, 1, size=array.shape).astype(np.float32)
        noise = noise if path.endswith("variance") else noise * np.resize([1, -1], array.shape)
        changed = dataclasses.replace(pair, params={**pair.params, path: array + noise})
        seen = gap(our_logits(changed, batch), expected) > 10 * TOLERANCE
        # Softmax takes the bias of the keys away again; the mask is one of pretraining.
        assert seen != path.endswith(("attn/k/bias", "embed/mask")), path


def our_gradients(pair: Pair, batch, *, training: bool) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(gradients of all parameters, statistics after the pass), both under the names of the reference."""
    stats = {path: a for path, a in pair.params.items() if path in pair.model.template.stats}
    params = {path: a for path, a in pair.params.items() if path not in stats}

    def total(params):
        held = {path: Moving(array) for path, array in stats.items()}
        key = jax.numpy.zeros(2, jax.numpy.uint32) if training else None
        outputs = pair.model.template.bind({**params, **held})(batch, key=key)
        found = cross_entropy(outputs, batch["label"], batch["weight"])
        return found.total, (found.weight, {path: statistic.moved for path, statistic in held.items()})

    gradients, (weight, moved) = jax.jit(jax.grad(total, has_aux=True))(params)
    found = save(pair.model.table, {p: np.asarray(a) for p, a in {**stats, **moved, **gradients}.items()})
    kept = {row.theirs for row in pair.model.table.rows if row.ours in stats}
    return (
        {name: a / np.asarray(weight) for name, a in found.items() if name not in kept | {*pair.model.table.counters}},
        {name: found[name] for name in kept},
    )


def torch_gradients(pair: Pair, encoded, directory: Path) -> dict[str, np.ndarray]:
    """Gradients of the loss that `transformers` computes itself, under the names that it saves them by."""
    pair.reference.zero_grad()
    pair.reference(**torch_batch(encoded)).loss.backward()
    with torch.no_grad():
        for parameter in pair.reference.parameters():
            if parameter.grad is not None:
                parameter.copy_(parameter.grad)
    pair.reference.save_pretrained(directory)
    saved = open_checkpoint(directory)
    own = {row.theirs for row in pair.model.table.rows if row.ours not in pair.model.template.stats}
    return {name: saved.read(name) for name in own}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [*DEEP, "resnet-basic", "dinov2-swiglu-no-mask"])
def test_gradients_equal_the_reference(name, training, tmp_path, record_property):
    """C28: the gradient of every parameter agrees within 1e-4 of its norm, through norms of running statistics and
    through norms of the batch's own, which filler has no part in; and so do the statistics that are moved.
    """
    pair = pair_of(name, tmp_path / "source")
    encoded = images(pair.reference, 6)
    ours, moved = our_gradients(pair, one_a_row(encoded), training=training)
    pair.reference.train(training)
    theirs = torch_gradients(pair, encoded, tmp_path / "gradients")
    found = gaps(ours, theirs)
    record_property("parity", f"{CASES[name][0]}|{KIND}|gradients|{worst(found):.1e}")
    assert worst(found) < TOLERANCE, found
    buffers = dict(pair.reference.named_buffers())
    statistics = {name: buffers[name].numpy() for name in moved if name in buffers}
    assert bool(statistics) == name.startswith("resnet")
    assert all(np.allclose(moved[name], a, rtol=1e-5, atol=1e-6) for name, a in statistics.items())


@pytest.mark.parametrize("name", CASES)
def test_an_export_reads_back_whole(name, tmp_path, record_property):
    """R57: what is written is what was read, tensor by tensor; `transformers` misses nothing and finds nothing more."""
    pair = pair_of(name, tmp_path / "source")
    tensors, source = save(pair.model.table, pair.params), open_checkpoint(tmp_path / "source")
    assert tensors.keys() == source.shapes.keys()
    write_checkpoint(tmp_path / "export", source.config, tensors)
    model, report = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    assert not any(report.values()), report
    before = pair.reference.state_dict()
    assert all(torch.equal(before[key], tensor) for key, tensor in model.eval().state_dict().items())
    encoded = images(model, 3)
    found = gap(our_logits(pair, one_a_row(encoded)), torch_logits(model, encoded))
    record_property("parity", f"{CASES[name][0]}|{KIND}|export|{found:.1e}")
    assert found < TOLERANCE


@pytest.mark.parametrize("name", DEEP)
def test_a_bare_encoder_loads_with_a_new_head(name, tmp_path):
    """C23: a checkpoint of the backbone alone gives the same features; nothing but the head begins anew."""
    pair = pair_of(name, tmp_path / "source")
    bare = getattr(pair.reference, pair.reference.base_model_prefix)
    bare.save_pretrained(tmp_path / "bare")
    checkpoint = open_checkpoint(tmp_path / "bare")
    assert not any(key.startswith(f"{pair.reference.base_model_prefix}.") for key in checkpoint.shapes)
    model = build_model(checkpoint.config, Head(KIND, 5), "bare")
    matched, params = load_model(model, checkpoint)
    assert matched.initialised == ("head/out/kernel", "head/out/bias")
    assert all((params[path] == pair.params[path]).all() for path in params)


def test_published_sizes_equal_the_reference(record_property):
    """R57: ResNet-50 at 64 pixels and ViT-base at 224 (random weights) agree on an image but for rounding."""
    for family, size in (("resnet", 64), ("vit", 224)):
        with tempfile.TemporaryDirectory() as directory:  # half a gigabyte, not to be kept as pytest keeps tmp_path
            pair = paired(with_statistics(randomised(family, PUBLISHED[family], 0, 0.0, KIND)), Path(directory))
            held = sum(a.size for path, a in pair.params.items() if path not in pair.model.template.stats)
            assert held == sum(p.numel() for p in pair.reference.parameters())
            encoded = images(pair.reference, 1, (size, size))
            expected = torch_logits(pair.reference, encoded)
            found = gap(our_logits(pair, one_a_row(encoded)), expected)
            allowed = rounded(pair.reference, lambda reference, given=encoded: torch_logits(reference, given), gap)
        record_property("parity", f"{family}|{KIND}|published|{found:.1e}")
        assert expected.std() > 0.01 and found < allowed


TORCHVISION = {
    "resnet.embedder.embedder.convolution": "conv1",
    "resnet.embedder.embedder.normalization": "bn1",
    "classifier.1": "fc",
}


def torchvision_name(name: str) -> str:
    """What torchvision calls a tensor of `transformers`."""
    layer, _, kind = name.rpartition(".")
    if layer in TORCHVISION:
        return f"{TORCHVISION[layer]}.{kind}"
    _, _, _, stage, _, block, *rest = layer.split(".")  # resnet.encoder.stages.S.layers.B.(layer.I|shortcut).WHAT
    norm = rest[-1] == "normalization"
    own = f"downsample.{int(norm)}" if rest[0] == "shortcut" else f"{'bn' if norm else 'conv'}{int(rest[1]) + 1}"
    return f"layer{int(stage) + 1}.{block}.{own}.{kind}"


@pytest.mark.parametrize("name", ["resnet", "resnet-basic"])
def test_checkpoints_of_torchvision_load(name, tmp_path):
    """R57: a ResNet under the names of torchvision is the same one, with or without its counters of batches."""
    pair = pair_of(name, tmp_path / "source")
    config, tensors = open_checkpoint(tmp_path / "source").config, save(pair.model.table, pair.params)
    tensors = {torchvision_name(key): tensor for key, tensor in tensors.items()}
    assert {"conv1.weight", "bn1.running_var", "layer1.0.conv2.weight", "layer2.0.downsample.1.bias", "fc.bias"} <= {
        *tensors
    }
    write_checkpoint(tmp_path / "torchvision", config, tensors)
    checkpoint = open_checkpoint(tmp_path / "torchvision")
    matched, params = load_model(pair.model, checkpoint)
    assert not matched.initialised and len(matched.ignored) == len(pair.model.table.counters)
    assert all((params[path] == pair.params[path]).all() for path in pair.params)
