"""Gemma and Gemma 2, and the configuration of Gemma 3: Llama's blocks with other norms, scales and soft caps.

Reference: `transformers.Gemma...` and `Gemma2...`; papers: arXiv 2403.08295, 2408.00118, 2503.19786.
"""

from types import NoneType
from typing import Any

from sft_jax.errors import ModelError
from sft_jax.models import decoder, llama
from sft_jax.models.decoder import DecoderConfig, LayerKind, limits
from sft_jax.models.family import Family, refuse, whole
from sft_jax.nn.rope import read_rope

THETA, GLOBAL_THETA = 10_000.0, 1_000_000.0  # of Gemma 3, of layers with a window and of the others


def configure(config: dict[str, Any], dropout: float | None) -> DecoderConfig:
    """The decoder that a Gemma `config.json` describes."""
    name = config["model_type"]
    plain = {"use_bidirectional_attention": False, "token_classification_bias": True}
    refuse(config, name, plain | ({"attn_logit_softcapping": None} if name == "gemma3_text" else {}))
    size, heads = whole(config, "hidden_size"), whole(config, "num_attention_heads")
    layers = whole(config, "num_hidden_layers", most=decoder.MOST["num_layers"])
    activation = config.get("hidden_act" if name == "gemma" else "hidden_activation", "gelu_pytorch_tanh")
    capped = name == "gemma2"
    attention = config.get("attention_dropout") or 0.0
    return DecoderConfig(
        vocab_size=config["vocab_size"],
        size=size,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=whole(config, "num_key_value_heads", 16 if name == "gemma" else 4),
        head_dim=whole(config, "head_dim", 256),
        mlp_size=whole(config, "intermediate_size"),
        num_positions=config["max_position_embeddings"],
        # What the first release calls gelu is the approximation.
        activation="gelu_pytorch_tanh" if (name, activation) == ("gemma", "gelu") else activation,
        norm="centred rms",
        norm_eps=config.get("rms_norm_eps", 1e-6),
        init_std=config.get("initializer_range", 0.02),
        embed_dropout=0.0,
        dropout=0.0,
        attention_dropout=attention if dropout is None else dropout,
        head_dropout=decoder.token_dropout(config) if dropout is None else dropout,
        layers=layer_kinds(config, layers),
        tied=config.get("tie_word_embeddings", True),
        gated=True,
        qkv_bias=config.get("attention_bias", False),
        out_bias=config.get("attention_bias", False),
        mlp_bias=False,
        qk_norm=name == "gemma3_text",
        post_norms=name != "gemma",
        embed_scale=size**0.5,
        attention_scale=None if name == "gemma" else whole(config, "query_pre_attn_scalar", 256) ** -0.5,
        softcap=config.get("attn_logit_softcapping", 50.0) if capped else None,
        logit_softcap=None if name == "gemma" else config.get("final_logit_softcapping", 30.0 if capped else None),
        **decoder.shared(config),
    )


def layer_kinds(config: dict[str, Any], layers: int) -> tuple[LayerKind, ...]:
    """Window and rotary positions of each layer: the same in Gemma, windows alternating in Gemma 2, both in Gemma 3."""
    name = config["model_type"]
    head_dim, positions = whole(config, "head_dim", 256), whole(config, "max_position_embeddings")
    parameters = llama.rope_parameters(config)
    if name == "gemma":
        return (LayerKind(rope=read_rope(parameters, head_dim, positions)),) * layers
    window, kinds = whole(config, "sliding_window", 4096), config.get("layer_types")
    every = 2 if name == "gemma2" else whole(config, "sliding_window_pattern", 6)
    if kinds is None:
        kinds = ["sliding_attention" if (number + 1) % every else "full_attention" for number in range(layers)]
    near = far = parameters
    if name == "gemma3_text":
        near, far = local_and_global(config, parameters)
    sliding = LayerKind(window, read_rope(near, head_dim, positions))
    full = LayerKind(None, read_rope(far, head_dim, positions))
    return tuple(sliding if seen else full for seen in decoder.windows_of(kinds, window, layers))


def local_and_global(config: dict[str, Any], parameters: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rotary positions of Gemma 3's layers with a window and without: named by kind today, apart in old files."""
    near, far = (parameters.pop(kind, None) for kind in ("sliding_attention", "full_attention"))
    if any(type(part) not in (dict, NoneType) for part in (near, far)):
        raise ModelError("config.json: rope_parameters of a kind of layers are no mapping; fetch the checkpoint again")
    if near is None and far is None:
        near, far = {"rope_theta": config.get("rope_local_base_freq", THETA)}, parameters
    return {"rope_theta": THETA, **(near or {})}, {"rope_theta": GLOBAL_THETA, **(far or {})}


FAMILY = Family(
    configure=configure,
    build=llama.build,
    table=llama.table,
    heads=decoder.HEADS,
    classes={"gemma": "Gemma", "gemma2": "Gemma2"},
    limits=limits,
)
