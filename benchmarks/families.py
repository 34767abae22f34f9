"""Steps of models at their published sizes, ours and PyTorch's, in one process and in turns.

Weights are random; both sides have the same ones, by a checkpoint on the disk, and the same batch. A step is forward,
backward and AdamW in float32. Translation is greedy or by beams, every answer as long as it may be, so that both sides
do the same work. Reports medians and ratios; asserts nothing about time.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft_jax import machine as computer

computer.quiet()
computer.relaunch_with_huge_pages()  # both sides have them then
computer.tune()

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers
from rich.console import Console
from rich.table import Table
from text_classification import machine, new_result, revision, save, spread, versions

from sft_jax.models.family import Head, build_model, load_model
from sft_jax.nn.template import Moving
from sft_jax.weights.files import open_checkpoint

Tree = dict[str, Any]
SIZES: dict[str, tuple[str, Tree, str]] = {
    "resnet-50": ("resnet", {"num_labels": 10}, "image_classification"),
    "vit-base": ("vit", {"num_labels": 10}, "image_classification"),
    "marian-base": (
        "marian",
        {
            "vocab_size": 59514,
            "d_model": 512,
            "encoder_ffn_dim": 2048,
            "decoder_ffn_dim": 2048,
            "encoder_layers": 6,
            "decoder_layers": 6,
            "encoder_attention_heads": 8,
            "decoder_attention_heads": 8,
            "max_position_embeddings": 512,
            "scale_embedding": True,
            "activation_function": "swish",
            "pad_token_id": 59513,
            "decoder_start_token_id": 59513,
            "eos_token_id": 0,
            "forced_eos_token_id": 0,
            "dropout": 0.0,
        },
        "seq2seq",
    ),
}


def main() -> None:
    """Measure what is asked for, keep it, show it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--tokens", type=int, default=32, help="of a source, and of a target")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="report; left out: a new file in results/")
    options = parser.parse_args()
    options.out = options.out or new_result(Path(__file__).stem)
    report: Tree = {"revision": revision(), "machine": machine(), "versions": versions(), "options": vars(options)}
    report["runs"] = {}
    for name in options.families:
        for what, sides in works(name, options).items():
            report["runs"][f"{name}, {what}"] = in_turns(sides, options.rounds)
            save(options.out, report)
    Console().print(table(report["runs"]))


def works(name: str, options: argparse.Namespace) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """What is measured of a model: name -> (ours, theirs), each to be called often."""
    kind, settings, head = SIZES[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **settings)
    make = transformers.AutoModelForSeq2SeqLM if head == "seq2seq" else transformers.AutoModelForImageClassification
    theirs = make.from_config(config)
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        checkpoint = open_checkpoint(Path(directory))
        model = build_model(checkpoint.config, Head(head, config.num_labels if head != "seq2seq" else 0), name)
        params = {path: jnp.asarray(array) for path, array in load_model(model, checkpoint)[1].items()}
    draw = np.random.default_rng(0)
    made = translation(draw, options, config) if head == "seq2seq" else images(draw, options)
    return made(model, params, theirs)


def images(draw: np.random.Generator, options: argparse.Namespace) -> Callable[..., Tree]:
    """Steps on images: all trained, and the forward pass that a frozen backbone needs."""
    pixels = draw.normal(size=(options.batch, options.pixels, options.pixels, 3)).astype(np.float32)
    labels = np.arange(options.batch) % 10

    def made(model: Any, params: Tree, theirs: Any) -> Tree:
        batch = {"pixel_values": jnp.asarray(pixels), "weight": jnp.ones((options.batch, 1))}
        given = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)

        def loss(logits: Any) -> Any:
            return -jax.nn.log_softmax(logits[:, 0])[jnp.arange(options.batch), labels].mean()

        def their_forward() -> Any:
            theirs.eval()
            with torch.no_grad():
                return theirs(given[0]).logits

        forward = jax.jit(lambda params: model.template.bind(params)(batch))
        return {
            "forward": (lambda: jax.block_until_ready(forward(params)), their_forward),
            "step": (
                our_step(model, params, batch, loss),
                their_step(theirs, lambda: theirs(given[0], labels=given[1]).loss),
            ),
        }

    return made


def translation(draw: np.random.Generator, options: argparse.Namespace, config: Any) -> Callable[..., Tree]:
    """A step on pairs, and answers by four beams."""
    shape = (options.batch, options.tokens)
    source, target = (draw.integers(5, config.vocab_size - 10, size=shape).astype(np.int32) for _ in range(2))

    def made(model: Any, params: Tree, theirs: Any) -> Tree:
        from sft_jax.config.generation import Generation
        from sft_jax.data.batch import Encoded
        from sft_jax.infer.generate import Generator
        from sft_jax.tasks.vocabulary import token_loss

        ones, places = jnp.ones(shape, jnp.int32), jnp.broadcast_to(jnp.arange(options.tokens), shape)
        shifted = np.concatenate([np.full((options.batch, 1), config.decoder_start_token_id), target[:, :-1]], axis=1)
        sides = {"segment_ids": ones, "position_ids": places}
        batch = {"input_ids": jnp.asarray(source), "decoder_input_ids": jnp.asarray(shifted, jnp.int32), **sides}
        batch |= {f"decoder_{name}": array for name, array in sides.items()}
        given = {"input_ids": torch.from_numpy(source).long(), "labels": torch.from_numpy(target).long()}

        def loss(logits: Any) -> Any:
            return token_loss(logits, jnp.asarray(target), ones.astype(jnp.float32)) / ones.size

        written = Generation(num_beams=4, max_new_tokens=options.tokens)
        generator = Generator(model, written, ())
        offsets = np.arange(options.batch + 1) * options.tokens
        prompts = Encoded({"input_ids": source.reshape(-1)}, offsets, {})
        how = {"num_beams": 4, "max_new_tokens": options.tokens, "min_new_tokens": options.tokens, "do_sample": False}

        def their_answers() -> Any:
            theirs.eval()
            with torch.no_grad():
                return theirs.generate(input_ids=given["input_ids"], **how)

        return {
            "step": (our_step(model, params, batch, loss), their_step(theirs, lambda: theirs(**given).loss)),
            "4 beams": (lambda: list(generator(params, prompts, options.batch)), their_answers),
        }

    return made


def our_step(model: Any, params: Tree, batch: Tree, loss: Callable[[Any], Any]) -> Callable[[], Any]:
    """Forward, backward and AdamW, parameters donated; statistics move."""
    stats = {path: array for path, array in params.items() if path in model.template.stats}
    held = {path: array.copy() for path, array in params.items() if path not in stats}
    optimizer = optax.adamw(1e-5)

    def total(params: Tree) -> tuple[Any, Tree]:
        moving = {path: Moving(array) for path, array in stats.items()}
        out = model.template.bind({**params, **moving})(batch, key=jnp.zeros(2, jnp.uint32))
        return loss(out), {path: one.moved for path, one in moving.items()}

    def step(params: Tree, state: Any) -> tuple[Tree, Any, Any]:
        (value, _), gradients = jax.value_and_grad(total, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    compiled, now = jax.jit(step, donate_argnums=(0, 1)), [held, optimizer.init(held)]

    def call() -> float:
        now[0], now[1], value = compiled(*now)
        return float(value)

    return call


def their_step(model: Any, loss: Callable[[], Any]) -> Callable[[], Any]:
    """Forward, backward and fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def call() -> float:
        model.train()
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return float(value.detach())

    return call


def in_turns(sides: tuple[Callable[[], Any], Callable[[], Any]], rounds: int) -> Tree:
    """Seconds of each side, by the second call of every turn: the first one compiles, or finds its memory gone."""
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds):
        for number, side in enumerate(sides):
            side()
            begun = time.perf_counter()
            side()
            seconds[number].append(time.perf_counter() - begun)
    ratios = spread([theirs / ours for ours, theirs in zip(*seconds, strict=True)])
    return {"ours": statistics.median(seconds[0]), "theirs": statistics.median(seconds[1]), "ratio": ratios}


def table(runs: Tree) -> Table:
    """A row for each work."""
    found = Table("work", "ours, s", "PyTorch, s", "times as fast (least to most)")
    for name, run in runs.items():
        ratio = run["ratio"]
        spread_of = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        found.add_row(name, f"{run['ours']:.2f}", f"{run['theirs']:.2f}", spread_of)
    return found


if __name__ == "__main__":
    main()
