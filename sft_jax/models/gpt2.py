"""GPT-2. Reference: `transformers.GPT2...`; paper: "Language models are unsupervised multitask learners", 2019."""

from typing import Any

from flax import nnx

from sft_jax.models import decoder
from sft_jax.models.decoder import Decoder, DecoderConfig, LayerKind, limits
from sft_jax.models.family import Family, Head, refuse, whole
from sft_jax.weights.table import SAME, Row, Table, fused, linear, norm, over_layers

# Keys of `config.json` that are of its second head, of old files, and of an order of products.
UNREAD = (
    "n_ctx", "reorder_and_upcast_attn", "summary_activation", "summary_first_dropout", "summary_last_dropout",
    "summary_proj_to_labels", "summary_type", "summary_use_proj",
)  # fmt: skip
OUT = {"sequence_classification": "score", "token_classification": "classifier"}


def configure(config: dict[str, Any], dropout: float | None) -> DecoderConfig:
    """The decoder that a GPT-2 `config.json` describes."""
    plain = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    refuse(config, "gpt2", plain)
    size, heads = whole(config, "n_embd"), whole(config, "n_head")
    layers = whole(config, "n_layer", most=decoder.MOST["num_layers"])
    return DecoderConfig(
        vocab_size=config["vocab_size"],
        size=size,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=decoder.even_share(size, heads),
        mlp_size=whole(config, "n_inner", 4 * size),
        num_positions=config["n_positions"],
        activation=config.get("activation_function", "gelu_new"),
        norm="layer",
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        init_std=config.get("initializer_range", 0.02),
        embed_dropout=config.get("embd_pdrop", 0.1) if dropout is None else dropout,
        dropout=config.get("resid_pdrop", 0.1) if dropout is None else dropout,
        attention_dropout=config.get("attn_pdrop", 0.1) if dropout is None else dropout,
        head_dropout=decoder.token_dropout(config) if dropout is None else dropout,
        layers=(LayerKind(),) * layers,
        tied=config.get("tie_word_embeddings", True),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        **decoder.shared(config),
    )


def build(config: DecoderConfig, head: Head) -> nnx.Module:
    """The decoder with the head asked for."""
    return Decoder(config, decoder.make_head(config, head))


def table(config: DecoderConfig, head: Head) -> Table:
    """All of GPT-2, whose kernels are [inputs, outputs] on disk as here; queries, keys and values are one tensor."""
    layer = "transformer.h.{i}"
    qkv = ((linear(f"blocks/{{i}}/attn/{n}", f"{layer}.attn.c_attn", "embed heads", layout=SAME)) for n in "qkv")
    block = (
        *norm("blocks/{i}/attn_norm", f"{layer}.ln_1"),
        *fused((rows, config.size) for rows in qkv),
        *linear("blocks/{i}/attn/o", f"{layer}.attn.c_proj", "heads embed", layout=SAME),
        *norm("blocks/{i}/mlp_norm", f"{layer}.ln_2"),
        *linear("blocks/{i}/mlp/up", f"{layer}.mlp.c_fc", "embed mlp", layout=SAME),
        *linear("blocks/{i}/mlp/down", f"{layer}.mlp.c_proj", "mlp embed", layout=SAME),
    )
    return Table(
        family="gpt2",
        rows=(
            Row("embed/word/embedding", "transformer.wte.weight", SAME, "vocab embed"),
            Row("embed/position/embedding", "transformer.wpe.weight", SAME, ". embed"),
            *over_layers(block, config.num_layers),
            *norm("norm", "transformer.ln_f"),
            *decoder.head_rows(config, head, OUT),
        ),
        prefix="transformer.",
        # Masks are not parameters.
        ignore=("*.attn.bias", "*.attn.masked_bias", *decoder.other_heads(config, head, OUT)),
        copies=decoder.tied_copies(config, head, "transformer.wte.weight"),
    )


FAMILY = Family(
    configure=configure,
    build=build,
    table=table,
    heads=decoder.HEADS | {"causal_lm": "LMHeadModel"},
    classes={"gpt2": "GPT2"},
    limits=limits,
    names={
        "gpt2": {
            "hidden_size": "n_embd",
            "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        }
    },
    unread=UNREAD,
)
