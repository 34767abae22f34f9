"""Generation equals `generate` of `transformers`, token for token, on batches of prompts of different lengths."""

import itertools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from torch_reference import torch, transformers

from sft_jax.config.generation import Generation
from sft_jax.data.batch import Encoded
from sft_jax.infer import generate
from sft_jax.infer.generate import Answer, Generator
from sft_jax.models.family import Head, build_model, load_model
from sft_jax.weights.files import open_checkpoint

STOP = tuple(range(3, 60, 6))  # so many of the 61 tokens that some answers end early
MOST = 14
SMALL = {"vocab_size": 61, "eos_token_id": list(STOP), "pad_token_id": 0, "bos_token_id": 1}
LLAMA = {
    **SMALL,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CASES = {
    "gpt2": {**SMALL, "n_embd": 20, "n_layer": 2, "n_head": 5, "n_positions": 64, "attn_pdrop": 0, "resid_pdrop": 0},
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": 5, "head_dim": 4},
    "qwen3": {**LLAMA, "head_dim": 8, "tie_word_embeddings": True},
}
SEARCHES = {
    "greedy": {},
    "4 beams": {"num_beams": 4},
    "3 beams, short": {"num_beams": 3, "length_penalty": -0.7, "early_stopping": True},
    "2 beams, to the end": {"num_beams": 2, "length_penalty": 1.8, "early_stopping": "never"},
}


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(model type, the reference, our model, its parameters)."""
    directory = tmp_path_factory.mktemp("generation") / request.param
    reference = made(request.param, directory)
    checkpoint = open_checkpoint(directory)
    model = build_model(checkpoint.config, Head("causal_lm", 0), str(directory))
    params = {path: jnp.asarray(array) for path, array in load_model(model, checkpoint)[1].items()}
    return request.param, reference, model, params


def made(name: str, directory: Path) -> "torch.nn.Module":
    """A random model on disk, spread wide enough that its answers differ."""
    config = transformers.AutoConfig.for_model(name, **CASES[name])
    torch.manual_seed(5)
    reference = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.25 * torch.randn(parameter.shape, generator=generator))
    reference.eval().save_pretrained(directory)
    return reference


def prompts(count: int = 11, longest: int = 15) -> Encoded:
    """Prompts of 1 to `longest` random tokens."""
    draw = np.random.default_rng(2)
    lengths = np.concatenate([[1, longest], draw.integers(2, longest, count - 2)])
    ids = draw.integers(8, 61, lengths.sum()).astype(np.int32)
    return Encoded({"input_ids": ids}, np.concatenate([[0], np.cumsum(lengths)]), {})


def theirs(reference: "torch.nn.Module", given: Encoded, settings: dict) -> list[list[int]]:
    """What the reference generates, without the token that ends an answer; prompts padded on the left."""
    longest = int(given.lengths.max())
    ids, mask = np.zeros((len(given), longest), np.int64), np.zeros((len(given), longest), np.int64)
    for row, length in enumerate(given.lengths):
        ids[row, longest - length :] = given.tokens["input_ids"][given.places([row])]
        mask[row, longest - length :] = 1
    with torch.no_grad():
        found = reference.generate(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            max_new_tokens=MOST,
            do_sample=False,
            **settings,
        ).numpy()[:, longest:]
    return [list(itertools.takewhile(lambda token: token not in STOP, row.tolist()))[:MOST] for row in found]


def ours(pair, given: Encoded, settings: dict, batch_size: int = 4) -> list[Answer]:
    """Our answers."""
    _, _, model, params = pair
    return list(Generator(model, Generation(max_new_tokens=MOST, **settings), STOP)(params, given, batch_size))


def test_answers_equal_those_of_the_reference(pair, record_property):
    """R40 C5: greedy and with beams, every token of every answer is that of `generate`; some answers end early."""
    given, every = prompts(), []
    for settings in SEARCHES.values() if pair[0] == "llama" else list(SEARCHES.values())[:2]:
        answers = ours(pair, given, settings)
        found, expected = [answer.ids for answer in answers], theirs(pair[1], given, settings)
        wrong = sum(a != b for a, b in zip(found, expected, strict=True))
        record_property("parity", f"{pair[0]}|causal_lm|generation|{wrong}")
        assert found == expected, settings
        assert all(answer.stopped == (len(answer.ids) < MOST) for answer in answers)
        every += answers
    assert sum(answer.stopped for answer in every) > 1 and len({len(answer.ids) for answer in every}) > 1


@pytest.mark.parametrize("pair", ["gpt2"], indirect=True)
def test_the_batch_changes_no_answer(pair, monkeypatch):
    """C24 R40: an answer is the same alone and among prompts of other lengths, drawn ones too."""
    given = prompts(longest=19)  # two buckets
    monkeypatch.setattr(generate, "WINDOW", 2)
    for settings in ({"num_beams": 2}, {"temperature": 1.3, "top_k": 20, "top_p": 0.9}):
        together, alone = ours(pair, given, settings, 11), ours(pair, given, settings, 1)
        assert [answer.ids for answer in together] == [answer.ids for answer in alone]


@pytest.mark.parametrize("pair", ["gpt2"], indirect=True)
def test_the_comparison_sees_a_wrong_position(pair):
    """Negative control: prompts whose first token is left out are answered otherwise."""
    given = prompts()
    whole = [answer.ids for answer in ours(pair, given, {})]
    kept = np.concatenate([given.places([row])[1:] for row in range(1, len(given))])
    lengths = given.lengths[1:] - 1
    cut = Encoded({"input_ids": given.tokens["input_ids"][kept]}, np.concatenate([[0], np.cumsum(lengths)]), {})
    assert sum(a.ids != b for a, b in zip(ours(pair, cut, {}), whole[1:], strict=True)) > 3
