"""Marian, the models of OPUS-MT. Reference: `transformers.MarianMTModel`; paper: arXiv 1804.00344."""

from typing import Any

from flax import nnx

from sft_jax.models.decoder import even_share
from sft_jax.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig, limits, sinusoids
from sft_jax.models.family import LM_HEAD, Family, Head, refuse, whole
from sft_jax.weights.table import SAME, Layout, Row, Table, linear, norm, over_layers

SIDES = ("encoder", "decoder")
ONE_ROW = Layout(lambda a: a[0], lambda a: a[None], lambda shape: shape[1:])  # [1, v] on disk


def configure(config: dict[str, Any], dropout: float | None) -> EncoderDecoderConfig:
    """The encoder and decoder that a Marian `config.json` describes."""
    size, heads = whole(config, "d_model"), whole(config, "encoder_attention_heads")
    plain = {
        "decoder_attention_heads": heads,
        "share_encoder_decoder_embeddings": True,
        "tie_word_embeddings": True,
        "normalize_before": False,
        "normalize_embedding": False,
        "static_position_embeddings": True,
        "add_final_layer_norm": False,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "decoder_vocab_size": config["vocab_size"],
        "is_causal": True,
    }
    refuse(config, "marian", plain)
    rates = (("dropout", 0.1), ("attention_dropout", 0.0), ("activation_dropout", 0.0))
    head_dim = even_share(size, heads)
    return EncoderDecoderConfig(
        vocab_size=config["vocab_size"],
        size=size,
        head_dim=head_dim,
        encoder_layers=config["encoder_layers"],
        decoder_layers=config["decoder_layers"],
        encoder_heads=heads,
        decoder_heads=heads,
        encoder_mlp_size=config["encoder_ffn_dim"],
        decoder_mlp_size=config["decoder_ffn_dim"],
        start=config["decoder_start_token_id"],
        fixed=config.get("pad_token_id"),
        num_positions=whole(config, "max_position_embeddings"),
        buckets=0,
        max_distance=1,
        activation=config.get("activation_function", "gelu"),
        gated=False,
        norm="layer",
        norm_eps=1e-5,
        bias=True,
        attention_scale=head_dim**-0.5,
        embed_scale=size**0.5 if config.get("scale_embedding", False) else 1.0,
        logit_scale=1.0,
        tied=True,
        logit_bias=True,
        init_std=config.get("init_std", 0.02),
        init_by_inputs=False,
        **{name: config.get(name, usual) if dropout is None else dropout for name, usual in rates},
    )


def build(config: EncoderDecoderConfig, head: Head) -> nnx.Module:
    """The encoder and decoder with their head on the vocabulary."""
    return EncoderDecoder(config)


def table(config: EncoderDecoderConfig, head: Head) -> Table:
    """All of Marian; the bias of its logits is a buffer there, and sinusoids are computed."""
    shared = "model.shared.weight"
    return Table(
        family="marian",
        rows=(
            Row("embed/word/embedding", shared, SAME, "vocab embed"),
            *over_layers(_block("encoder"), config.encoder_layers),
            *over_layers(_block("decoder"), config.decoder_layers),
            Row("head/bias", "final_logits_bias", ONE_ROW, "vocab"),
        ),
        prefix="model.",
        # Copies of the embeddings, which are all of both sides, and what is computed.
        ignore=("*embed_positions.weight", "*embed_tokens.weight", LM_HEAD),
        copies={**{f"model.{side}.embed_tokens.weight": shared for side in SIDES}, LM_HEAD: shared},
        computed={f"model.{side}.embed_positions.weight": lambda shape: sinusoids(*shape) for side in SIDES},
    )


def _block(side: str) -> tuple[Row, ...]:
    """The rows of one block of a side."""
    ours, theirs = f"{side}/blocks/{{i}}", f"model.{side}.layers.{{i}}"
    attentions = {"attn": "self_attn", **({"cross": "encoder_attn"} if side == "decoder" else {})}
    layers = {"q": ("q_proj", "embed heads"), "k": ("k_proj", "embed heads"), "v": ("v_proj", "embed heads")}
    layers["o"] = ("out_proj", "heads embed")
    rows = [
        row
        for name, found in attentions.items()
        for part, (layer, axes) in layers.items()
        for row in linear(f"{ours}/{name}/{part}", f"{theirs}.{found}.{layer}", axes)
    ]
    norms = [
        row for name, found in attentions.items() for row in norm(f"{ours}/{name}_norm", f"{theirs}.{found}_layer_norm")
    ]
    return (
        *rows,
        *norms,
        *linear(f"{ours}/mlp/up", f"{theirs}.fc1", "embed mlp"),
        *linear(f"{ours}/mlp/down", f"{theirs}.fc2", "mlp embed"),
        *norm(f"{ours}/mlp_norm", f"{theirs}.final_layer_norm"),
    )


FAMILY = Family(
    configure=configure,
    build=build,
    table=table,
    heads={"seq2seq": "MTModel"},
    classes={"marian": "Marian"},
    limits=limits,
    names={
        "marian": {
            "num_attention_heads": "encoder_attention_heads",
            "hidden_size": "d_model",
            "num_hidden_layers": "encoder_layers",
        }
    },
    untied=None,
    unread=("forced_eos_token_id",),  # of answers
)
