"""Llama and its kin: Mistral, Qwen2, Qwen3 and Phi-3; SmolLM2 and others call themselves Llama.

Reference: `transformers.Llama...` and so on; papers: arXiv 2302.13971, 2310.06825, 2407.10671, 2505.09388, 2404.14219.
"""

from typing import Any

from flax import nnx

from sft_jax.errors import ModelError
from sft_jax.models import decoder
from sft_jax.models.decoder import Decoder, DecoderConfig, LayerKind, limits
from sft_jax.models.family import Family, Head, refuse, whole
from sft_jax.nn.rope import read_rope
from sft_jax.weights.table import SAME, Row, Table, fused, linear, norm, over_layers

OUT = {"sequence_classification": "score", "token_classification": "score"}


def configure(config: dict[str, Any], dropout: float | None) -> DecoderConfig:
    """The decoder that a `config.json` of one of these types describes."""
    name = config["model_type"]
    refuse(config, name, {"token_classification_bias": True})
    size, heads = whole(config, "hidden_size"), whole(config, "num_attention_heads")
    layers = whole(config, "num_hidden_layers", most=decoder.MOST["num_layers"])
    known = name == "qwen3" or config.get("head_dim") is not None
    head_dim = whole(config, "head_dim", 128) if known else decoder.even_share(size, heads)
    kv_heads = config.get("num_key_value_heads") if name in ("llama", "phi3") else config["num_key_value_heads"]
    rope = read_rope(rope_parameters(config), head_dim, whole(config, "max_position_embeddings"))
    full = LayerKind(rope=rope)
    biased = name in ("llama", "qwen3") and config.get("attention_bias", False)
    residual = config.get("resid_pdrop", 0.0) if dropout is None else dropout
    attention = config.get("attention_dropout") or 0.0
    return DecoderConfig(
        vocab_size=config["vocab_size"],
        size=size,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        mlp_size=whole(config, "intermediate_size"),
        num_positions=config["max_position_embeddings"],
        activation=config.get("hidden_act", "silu"),
        norm="rms",
        norm_eps=config.get("rms_norm_eps", 1e-5 if name == "phi3" else 1e-6),
        init_std=config.get("initializer_range", 0.02),
        embed_dropout=0.0,
        dropout=residual if name == "phi3" else 0.0,  # the others have no such rate
        attention_dropout=attention if dropout is None else dropout,
        head_dropout=decoder.token_dropout(config) if dropout is None else dropout,
        layers=tuple(LayerKind(window, rope) if window else full for window in windows(config, layers)),
        tied=config.get("tie_word_embeddings", False),
        gated=True,
        qkv_bias=biased or name == "qwen2",
        out_bias=biased,
        mlp_bias=name == "llama" and config.get("mlp_bias", False),
        qk_norm=name == "qwen3",
        fused=name == "phi3",
        **decoder.shared(config),
    )


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions as a `config.json` has them: `rope_parameters` of today, `rope_scaling` and others before."""
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if type(found) is not dict:
        raise ModelError(f"config.json: rope parameters are {found!r:.60}, expected a mapping")
    outside = ("rope_theta", "partial_rotary_factor")
    found = {**{key: config[key] for key in outside if config.get(key) is not None}, **found}
    original = config.get("original_max_position_embeddings")
    if config["model_type"] == "phi3":
        original = original or 4096
        if found.get("rope_type", found.get("type")) in ("su", "yarn"):  # what LongRoPE was called before
            found["rope_type"] = "longrope"
    elif found.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(f"config.json: partial_rotary_factor is not supported for {config['model_type']}; only 1.0 is")
    return found if original is None else {**found, "original_max_position_embeddings": original}


def windows(config: dict[str, Any], layers: int) -> list[int | None]:
    """How many tokens each layer sees, None for all: where a family has windows, on all its layers or on some."""
    name = config["model_type"]
    if name in ("mistral", "phi3"):
        window = config.get("sliding_window", 4096 if name == "mistral" else None)
        return [None if window is None else whole(config, "sliding_window", 4096)] * layers
    if name == "llama":
        return [None] * layers
    window = whole(config, "sliding_window", 4096) if config.get("use_sliding_window") else None
    first = config.get("max_window_layers", 28)
    kinds = config.get("layer_types")
    if kinds is None:
        return [window if type(first) is int and number >= first else None for number in range(layers)]
    return decoder.windows_of(kinds, window, layers)


def build(config: DecoderConfig, head: Head) -> nnx.Module:
    """The decoder with the head asked for."""
    return Decoder(config, decoder.make_head(config, head))


def table(config: DecoderConfig, head: Head) -> Table:
    """All of a Llama or a Gemma; Phi-3 keeps queries, keys and values in one tensor, and gate and up in another."""
    return Table(
        family="llama",
        rows=(
            Row("embed/word/embedding", "model.embed_tokens.weight", SAME, "vocab embed"),
            *over_layers(block_rows(config, "model.layers.{i}"), config.num_layers),
            *norm("norm", "model.norm", bias=False),
            *decoder.head_rows(config, head, OUT),
        ),
        prefix="model.",
        ignore=("*rotary_emb.inv_freq", *decoder.other_heads(config, head, OUT)),  # the first are no parameters
        copies=decoder.tied_copies(config, head, "model.embed_tokens.weight"),
    )


def block_rows(config: DecoderConfig, layer: str) -> tuple[Row, ...]:
    """The rows of one block; `layer` is its name in the checkpoint."""
    qkv = [(n, config.head_dim * (config.num_heads if n == "q" else config.num_kv_heads)) for n in "qkv"]
    attn, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    inside: tuple[Row, ...]
    if config.fused:
        inside = (
            *fused(
                (linear(f"blocks/{{i}}/attn/{n}", f"{attn}.qkv_proj", "embed heads", bias=False), s) for n, s in qkv
            ),
            *fused(
                (linear(f"blocks/{{i}}/mlp/{n}", f"{mlp}.gate_up_proj", "embed mlp", bias=False), config.mlp_size)
                for n in ("gate", "up")
            ),
        )
    else:
        b, m = config.qkv_bias, config.mlp_bias
        inside = tuple(
            row
            for rows in (
                *(linear(f"blocks/{{i}}/attn/{n}", f"{attn}.{n}_proj", "embed heads", bias=b) for n, _ in qkv),
                *(linear(f"blocks/{{i}}/mlp/{n}", f"{mlp}.{n}_proj", "embed mlp", bias=m) for n in ("gate", "up")),
            )
            for row in rows
        )
    qk_norms = (
        *norm("blocks/{i}/attn/q_norm", f"{attn}.q_norm", bias=False),
        *norm("blocks/{i}/attn/k_norm", f"{attn}.k_norm", bias=False),
    )
    norms = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if config.post_norms:
        norms |= {
            "attn_post": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post": "post_feedforward_layernorm",
        }
    return (
        *inside,
        *(qk_norms if config.qk_norm else ()),
        *linear("blocks/{i}/attn/o", f"{attn}.o_proj", "heads embed", bias=config.out_bias),
        *(
            row
            for ours, theirs in norms.items()
            for row in norm(f"blocks/{{i}}/{ours}", f"{layer}.{theirs}", bias=False)
        ),
        *linear("blocks/{i}/mlp/down", f"{mlp}.down_proj", "mlp embed", bias=config.mlp_bias),
    )


FAMILY = Family(
    configure=configure,
    build=build,
    table=table,
    heads=decoder.HEADS,
    classes={"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "phi3": "Phi3"},
    limits=limits,
    unread=("embd_pdrop", "pretraining_tp"),  # of old implementations
)
