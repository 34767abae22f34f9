"""ViT. Reference: `transformers.ViTForImageClassification`; paper: arXiv 2010.11929."""

from typing import Any

from flax import nnx

from sft_jax.models.family import Family, Head
from sft_jax.models.vision_encoder import VisionConfig, VisionEncoder, check_heads, square
from sft_jax.weights.table import SAME, Row, Table, conv, linear, norm, over_layers

HEADS = {"image_classification": "ForImageClassification"}
# Keys of `config.json` that are of other heads and of texts.
OF_OTHERS = ("encoder_stride", "pooler_act", "pooler_output_size", "tie_word_embeddings", "vocab_size")


def configure(config: dict[str, Any], dropout: float | None) -> VisionConfig:
    """The encoder that a ViT `config.json` describes."""
    check_heads(config)
    hidden = config.get("hidden_dropout_prob", 0.0) if dropout is None else dropout
    return VisionConfig(
        size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_size=config["intermediate_size"],
        image_size=square(config, "image_size"),
        patch_size=square(config, "patch_size"),
        channels=config.get("num_channels", 3),
        activation=config.get("hidden_act", "gelu"),
        norm_eps=config.get("layer_norm_eps", 1e-12),
        init_std=config.get("initializer_range", 0.02),
        embed_dropout=hidden,
        dropout=hidden,
        attention_dropout=config.get("attention_probs_dropout_prob", 0.0) if dropout is None else dropout,
        bias=config.get("qkv_bias", True),
    )


def build(config: VisionConfig, head: Head) -> nnx.Module:
    """The encoder with a linear layer on its features."""
    return VisionEncoder(config, head.size)


def embedding_rows(embeddings: str) -> tuple[Row, ...]:
    """Patches, class token and positions."""
    return (
        *conv("embed/patch", f"{embeddings}.patch_embeddings.projection", bias=True),
        Row("embed/cls", f"{embeddings}.cls_token", SAME, ". . embed"),
        Row("embed/position", f"{embeddings}.position_embeddings", SAME, ". . embed"),
    )


def attention_rows(layer: str, bias: bool) -> tuple[Row, ...]:
    """The attention of a block; `layer` is its name in the checkpoint."""
    own = f"{layer}.attention.attention"
    return (
        *linear("blocks/{i}/attn/q", f"{own}.query", "embed heads", bias=bias),
        *linear("blocks/{i}/attn/k", f"{own}.key", "embed heads", bias=bias),
        *linear("blocks/{i}/attn/v", f"{own}.value", "embed heads", bias=bias),
        *linear("blocks/{i}/attn/o", f"{layer}.attention.output.dense", "heads embed"),
    )


def table(config: VisionConfig, head: Head) -> Table:
    """All of ViT; the pooler of a bare encoder is not part of this head."""
    layer = "vit.encoder.layer.{i}"
    block = (
        *norm("blocks/{i}/attn_norm", f"{layer}.layernorm_before"),
        *attention_rows(layer, config.bias),
        *norm("blocks/{i}/mlp_norm", f"{layer}.layernorm_after"),
        *linear("blocks/{i}/mlp/up", f"{layer}.intermediate.dense", "embed mlp"),
        *linear("blocks/{i}/mlp/down", f"{layer}.output.dense", "mlp embed"),
    )
    return Table(
        family="vit",
        rows=(
            *embedding_rows("vit.embeddings"),
            *over_layers(block, config.num_layers),
            *norm("norm", "vit.layernorm"),
            *linear("head/out", "classifier", "embed .", head=True),
        ),
        prefix="vit.",
        ignore=("*pooler.dense.*", "*embeddings.mask_token", "decoder.*"),
    )


FAMILY = Family(
    configure=configure,
    build=build,
    table=table,
    heads=HEADS,
    classes={"vit": "ViT"},
    limits=lambda config: {},
    unread=OF_OTHERS,
)
