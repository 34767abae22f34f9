"""SmolLM2, real weights of four bits out of a GGUF file, by our own path: what it says, and how well it predicts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from sft_jax import assets
from sft_jax.data.text import TextTokenizer, load_tokenizer
from sft_jax.models.family import Head, build_model, load_model
from sft_jax.weights.files import find, open_checkpoint

HOME = assets.cache() / f"smollm2-{assets.ASSETS['smollm2'].sha256[:12]}"
pytestmark = pytest.mark.skipif(
    not HOME.is_dir(), reason="asset:smollm2 is not in the cache; fetch it by using it once"
)
ROOM = 48  # tokens of a row: one shape for all that is asked


class Asked(NamedTuple):
    """The model, ready to be asked."""

    tokenizer: TextTokenizer
    logits: jax.stages.Wrapped  # ids [1, ROOM], how many of them are there -> [ROOM, vocabulary]
    params: dict[str, jax.Array]

    @property
    def fast(self) -> Tokenizer:
        """The tokenizer of the library."""
        return self.tokenizer.fast

    def of(self, ids: list[int]) -> np.ndarray:
        """The logits that follow each of these tokens."""
        row = jnp.asarray([ids + [0] * (ROOM - len(ids))], jnp.int32)
        return np.asarray(self.logits(self.params, row, len(ids)))[: len(ids)]


@pytest.fixture(scope="module")
def model() -> Asked:
    """SmolLM2, found and loaded as a run would."""
    checkpoint = open_checkpoint(find(str(HOME)))
    model = build_model(checkpoint.config, Head("causal_lm", 0), "asset:smollm2")
    matched, params = load_model(model, checkpoint)
    assert not matched.initialised and not matched.ignored

    @jax.jit
    def logits(params, ids, count):
        place = jnp.arange(ROOM)[None]
        batch = {"input_ids": ids, "position_ids": place, "segment_ids": (place < count).astype(jnp.int32)}
        return model.template.bind(params)(batch).dense()[0]

    return Asked(load_tokenizer(checkpoint.directory), logits, jax.tree.map(jnp.asarray, params))


def test_what_it_says(model):
    """R57: asked in its own chat template for the capital of France, it answers with Paris, and ends its turn."""
    assert model.tokenizer.template is not None
    template = ImmutableSandboxedEnvironment().from_string(model.tokenizer.template)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = model.fast.encode(template.render(messages=asked, add_generation_prompt=True)).ids
    before = len(ids)
    while ids[-1] != model.tokenizer.id("eos_token"):  # the prompt ends with a line feed
        assert len(ids) < ROOM, f"no end: {model.fast.decode(ids)}"
        ids.append(int(model.of(ids)[-1].argmax()))
    assert model.fast.decode(ids[before:]) == "The capital of France is Paris."


def test_how_well_it_predicts(model):
    """R57: its perplexity on two English sentences is 12.55, as `transformers` finds with the same file."""
    text = (
        "The quick brown fox jumps over the lazy dog. "
        "Paris is the capital of France, and London is the capital of England."
    )
    ids = model.fast.encode(text).ids
    logits = jax.nn.log_softmax(model.of(ids))
    loss = -np.mean([logits[place, token] for place, token in enumerate(ids[1:])])
    assert np.exp(loss) == pytest.approx(12.55, rel=0.01)
