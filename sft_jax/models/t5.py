"""T5 and its versions 1.1 (Flan-T5). Reference: `transformers.T5ForConditionalGeneration`; paper: arXiv 1910.10683."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from sft_jax.errors import ModelError
from sft_jax.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig, limits
from sft_jax.models.family import LM_HEAD, Family, Head, refuse, whole
from sft_jax.weights.table import SAME, Row, Table, linear, norm, over_layers


def configure(config: dict[str, Any], dropout: float | None) -> EncoderDecoderConfig:
    """The encoder and decoder that a T5 `config.json` describes."""
    size, width, layers = whole(config, "d_model"), whole(config, "d_kv"), config["num_layers"]
    # Version 1.1 has a head of its own and does not scale, which old files say of both at once.
    tied = config.get("tie_word_embeddings", True) is not False
    scaled = bool(config.get("scale_decoder_outputs", tied))
    gated, activation = _feed_forward(config.get("feed_forward_proj", "relu"))
    refuse(config, "t5", {"is_causal": True, "is_gated_act": gated, "dense_act_fn": activation})
    rate = config.get("dropout_rate", 0.1) if dropout is None else dropout
    return EncoderDecoderConfig(
        vocab_size=config["vocab_size"],
        size=size,
        head_dim=width,
        encoder_layers=layers,
        decoder_layers=whole(config, "num_decoder_layers", whole(config, "num_layers")),
        encoder_heads=config["num_heads"],
        decoder_heads=config["num_heads"],
        encoder_mlp_size=config["d_ff"],
        decoder_mlp_size=config["d_ff"],
        start=config.get("decoder_start_token_id", config.get("pad_token_id", 0)),
        fixed=None,
        num_positions=0,
        buckets=whole(config, "relative_attention_num_buckets", 32),
        max_distance=whole(config, "relative_attention_max_distance", 128),
        activation=activation,
        gated=gated,
        norm="rms",
        norm_eps=config.get("layer_norm_epsilon", 1e-6),
        bias=False,
        attention_scale=1.0,
        embed_scale=1.0,
        logit_scale=size**-0.5 if scaled else 1.0,
        tied=tied,
        logit_bias=False,
        init_std=config.get("initializer_factor", 1.0),
        init_by_inputs=True,
        dropout=rate,
        attention_dropout=rate,
        activation_dropout=rate,
    )


def build(config: EncoderDecoderConfig, head: Head) -> nnx.Module:
    """The encoder and decoder with their head on the vocabulary."""
    return EncoderDecoder(config)


def table(config: EncoderDecoderConfig, head: Head) -> Table:
    """All of T5; distances have their biases in the first block there, and all blocks use them."""
    sides = {"encoder": config.encoder_layers, "decoder": config.decoder_layers}
    distances = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return Table(
        family="t5",
        rows=(
            Row("embed/word/embedding", "shared.weight", SAME, "vocab embed"),
            *(row for side, count in sides.items() for row in over_layers(_block(side, config.gated), count)),
            *(Row(f"{side}/distances/embedding", f"{side}.{distances}", SAME, ". .") for side in sides),
            *(row for side in sides for row in norm(f"{side}/norm", f"{side}.final_layer_norm", bias=False)),
            *(() if config.tied else (Row("head/embedding", LM_HEAD, SAME, "vocab embed"),)),
        ),
        # Copies of the embeddings, and biases of distances to the source, which old files hold and nothing reads.
        ignore=(
            "*.embed_tokens.weight",
            "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
            *((LM_HEAD,) if config.tied else ()),
        ),
        copies={
            **{f"{side}.embed_tokens.weight": "shared.weight" for side in sides},
            **({LM_HEAD: "shared.weight"} if config.tied else {}),
        },
    )


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a tied `config.json` says of a model with a head of its own, which scales as it did before."""
    return {"tie_word_embeddings": False, "scale_decoder_outputs": bool(config.get("scale_decoder_outputs", True))}


def _feed_forward(name: Any) -> tuple[bool, str]:
    """(whether there is a gate, the activation) of a name such as `gated-gelu`."""
    parts = name.split("-") if type(name) is str else []
    if len(parts) not in (1, 2) or (len(parts) == 2 and parts[0] != "gated"):
        raise ModelError(f"config.json: feed_forward_proj is {name!r:.60}, expected an activation, or gated- and one")
    return len(parts) == 2, "gelu_new" if name == "gated-gelu" else parts[-1]


def _block(side: str, gated: bool) -> tuple[Row, ...]:
    """The rows of one block of a side."""
    ours, theirs = f"{side}/blocks/{{i}}", f"{side}.block.{{i}}.layer"
    attentions = ["SelfAttention", *(["EncDecAttention"] if side == "decoder" else [])]
    rows: list[Row] = []
    for number, (name, found) in enumerate(zip(("attn", "cross"), attentions, strict=False)):
        for part, axes in (("q", "embed heads"), ("k", "embed heads"), ("v", "embed heads"), ("o", "heads embed")):
            rows += linear(f"{ours}/{name}/{part}", f"{theirs}.{number}.{found}.{part}", axes, bias=False)
        rows += norm(f"{ours}/{name}_norm", f"{theirs}.{number}.layer_norm", bias=False)
    last = f"{theirs}.{len(attentions)}"
    ups = {"gate": "wi_0", "up": "wi_1"} if gated else {"up": "wi"}
    for name, found in ups.items():
        rows += linear(f"{ours}/mlp/{name}", f"{last}.DenseReluDense.{found}", "embed mlp", bias=False)
    rows += linear(f"{ours}/mlp/down", f"{last}.DenseReluDense.wo", "mlp embed", bias=False)
    return (*rows, *norm(f"{ours}/mlp_norm", f"{last}.layer_norm", bias=False))


FAMILY = Family(
    configure=configure,
    build=build,
    table=table,
    heads={"seq2seq": "ForConditionalGeneration"},
    classes={"t5": "T5"},
    limits=limits,
    names={
        "t5": {
            "hidden_size": "d_model",
            "num_attention_heads": "num_heads",
            "num_hidden_layers": "num_layers",
            "head_dim": "d_kv",
        }
    },
    untied=untied,
    unread=("classifier_dropout",),  # of other heads
)
