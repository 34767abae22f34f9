"""What the benchmark of accelerators makes and counts: the published sizes, and files that both sides read."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from sft_jax.models.family import Head, build_model

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from speed_jobs import JOBS, flops, lengths, make, packed


def sizes_of(name: str) -> dict[str, int]:
    """How many numbers each parameter of a job's model has."""
    shapes = build_model(JOBS[name].config, Head("causal_lm", 0), name).template.shapes
    return {path: int(np.prod(shape)) for path, shape in shapes.items()}


@pytest.mark.parametrize(("name", "count"), [("llama-1b", 1_235_814_400), ("llama-8b-lora", 8_030_261_248)])
def test_sizes_are_the_published_ones(name, count):
    """R38: the Llamas have as many parameters as Meta's of that name."""
    assert sum(sizes_of(name).values()) == count


def test_operations_are_six_for_each_parameter_and_token():
    """R38: operations are those of the usual estimate, attention and adapters apart; nothing for padding."""
    for name in ("llama-1b", "llama-8b-lora"):
        job = JOBS[name]
        used = sum(size for path, size in sizes_of(name).items() if "norm" not in path)
        if job.trained == "adapter":
            used -= job.config["vocab_size"] * job.config["hidden_size"]  # looked up, not multiplied
        passes = 6 if job.trained == "all" else 4
        assert flops(job, 1000.0, 1.0) / (passes * used * 1000) == pytest.approx(1, abs=0.1)
    assert flops(JOBS["vit-base"], 0.0, 1.0) == pytest.approx(6 * 17.5e9, rel=0.05)
    assert flops(JOBS["resnet-50"], 0.0, 1.0) == 3 * flops(JOBS["resnet-50-frozen"], 0.0, 1.0)


def test_both_sides_read_the_same_tokens(tmp_path):
    """R38: the texts that ours tokenizes are the tokens that the peers are given."""
    from tokenizers import Tokenizer

    job = JOBS["bert-base"].shrunk()
    make(job, tmp_path / "job")
    held = np.load(tmp_path / "job" / "tokens.npz")
    tokenizer = Tokenizer.from_file(str(tmp_path / "job" / "model" / "tokenizer.json"))
    rows = [json.loads(line) for line in (tmp_path / "job" / "rows.jsonl").read_text().splitlines()]
    given = np.split(held["ids"], held["lengths"].cumsum()[:-1])
    assert len(rows) == len(given) == job.documents
    for row, ids in zip(rows, given, strict=True):
        assert tokenizer.encode(row["text"]).ids == ids.tolist()


def test_rows_are_full_of_whole_documents():
    """R38: every document is in one row, and no row is longer than it may be."""
    sizes = lengths(JOBS["llama-1b"])
    rows = packed(sizes, 4096)
    assert sorted(number for row in rows for number in row) == list(range(len(sizes)))
    assert max(sizes[row].sum() for row in rows) <= 4096 < sizes.sum() / len(rows) * 1.1
