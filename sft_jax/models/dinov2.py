"""DINOv2. Reference: `transformers.Dinov2ForImageClassification`; paper: arXiv 2304.07193."""

from typing import Any

from flax import nnx

from sft_jax.models.family import Family, Head, whole
from sft_jax.models.vision_encoder import VisionConfig, VisionEncoder, check_heads, square
from sft_jax.models.vit import HEADS, attention_rows, embedding_rows
from sft_jax.weights.table import SAME, Row, Table, fused, linear, norm, over_layers

# Keys of `config.json` that are of backbones and of texts.
OF_OTHERS = (
    "apply_layernorm", "out_features", "out_indices", "reshape_hidden_states", "stage_names", "tie_word_embeddings",
    "vocab_size",
)  # fmt: skip


def configure(config: dict[str, Any], dropout: float | None) -> VisionConfig:
    """The encoder that a DINOv2 `config.json` describes; `dropout` is none of its stochastic depth."""
    check_heads(config)
    inner, gated = whole(config, "hidden_size") * whole(config, "mlp_ratio", 4), config.get("use_swiglu_ffn", False)
    return VisionConfig(
        size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_size=(int(inner * 2 / 3) + 7) // 8 * 8 if gated is True else inner,
        image_size=square(config, "image_size"),
        patch_size=square(config, "patch_size"),
        channels=config.get("num_channels", 3),
        activation=config.get("hidden_act", "gelu"),
        norm_eps=config.get("layer_norm_eps", 1e-6),
        init_std=config.get("initializer_range", 0.02),
        embed_dropout=config.get("hidden_dropout_prob", 0.0) if dropout is None else dropout,
        dropout=0.0,
        attention_dropout=config.get("attention_probs_dropout_prob", 0.0) if dropout is None else dropout,
        bias=config.get("qkv_bias", True),
        scaled=True,
        layer_scale=config.get("layerscale_value", 1.0),
        gated=gated,
        drop_path=config.get("drop_path_rate", 0.0),
        mask_token=config.get("use_mask_token", True),
        mean_patch=True,
    )


def build(config: VisionConfig, head: Head) -> nnx.Module:
    """The encoder with a linear layer on the class token beside the mean of the patches."""
    return VisionEncoder(config, head.size)


def table(config: VisionConfig, head: Head) -> Table:
    """All of DINOv2."""
    layer, inner = "dinov2.encoder.layer.{i}", config.mlp_size
    both = f"{layer}.mlp.weights_in"
    gated = (
        *fused((linear(f"blocks/{{i}}/mlp/{name}", both, "embed mlp"), inner) for name in ("gate", "up")),
        *linear("blocks/{i}/mlp/down", f"{layer}.mlp.weights_out", "mlp embed"),
    )
    plain = (
        *linear("blocks/{i}/mlp/up", f"{layer}.mlp.fc1", "embed mlp"),
        *linear("blocks/{i}/mlp/down", f"{layer}.mlp.fc2", "mlp embed"),
    )
    block = (
        *norm("blocks/{i}/attn_norm", f"{layer}.norm1"),
        *attention_rows(layer, config.bias),
        Row("blocks/{i}/attn_scale/scale", f"{layer}.layer_scale1.lambda1", SAME, "."),
        *norm("blocks/{i}/mlp_norm", f"{layer}.norm2"),
        *(gated if config.gated else plain),
        Row("blocks/{i}/mlp_scale/scale", f"{layer}.layer_scale2.lambda1", SAME, "."),
    )
    mask = Row("embed/mask", "dinov2.embeddings.mask_token", SAME, ". embed")
    return Table(
        family="dinov2",
        rows=(
            *embedding_rows("dinov2.embeddings"),
            *((mask,) if config.mask_token else ()),
            *over_layers(block, config.num_layers),
            *norm("norm", "dinov2.layernorm"),
            *linear("head/out", "classifier", "embed .", head=True),
        ),
        prefix="dinov2.",
    )


FAMILY = Family(
    configure=configure,
    build=build,
    table=table,
    heads=HEADS,
    classes={"dinov2": "Dinov2"},
    limits=lambda config: {},
    unread=OF_OTHERS,
)
