"""Every family: its table covers its template, and what it cannot compute is refused by name."""

import importlib
import math

import jax
import numpy as np
import pytest
from conftest import TINY

from sft_jax.errors import ModelError
from sft_jax.models.encoder_decoder import distance_buckets, sinusoids
from sft_jax.models.family import FAMILIES, NO_LIMIT, Head, build_model, find_family
from sft_jax.nn.layers import ACTIVATIONS
from sft_jax.weights.table import match

HEAD = Head("sequence_classification", 3)
PIXELS = Head("image_classification", 3)
DISTIL = {
    "vocab_size": 45,
    "dim": 16,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 24,
    "max_position_embeddings": 48,
    "activation": "gelu",
    "pad_token_id": 0,
}
DECODER = {
    "vocab_size": 45,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 48,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": [12, 12],
    "patch_size": 4,
    "qkv_bias": True,
    "hidden_dropout_prob": 0.0,
}
OWN = {
    "distilbert": DISTIL,
    "gpt2": {"vocab_size": 45, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 24, "n_positions": 48},
    "llama": {**DECODER, "mlp_bias": True, "attention_bias": True, "rope_theta": 500.0, "rope_scaling": None},
    "mistral": {**DECODER, "sliding_window": 5},
    "qwen2": {**DECODER, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {**DECODER, "layer_types": ["full_attention", "full_attention"]},
    "phi3": {**DECODER, "original_max_position_embeddings": 24, "resid_pdrop": 0.0},
    "gemma": {**DECODER, "hidden_act": "gelu"},
    "gemma2": {**DECODER, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 50.0, "sliding_window": 5},
    "gemma3_text": {
        **DECODER,
        "sliding_window_pattern": 2,
        "rope_local_base_freq": 10.0,
        "final_logit_softcapping": None,
    },
    "resnet": {
        "embedding_size": 8,
        "hidden_sizes": [12, 16],
        "depths": [2, 1],
        "layer_type": "bottleneck",
        "downsample_in_first_stage": False,
        "num_channels": 3,
    },
    "vit": {**VISION, "intermediate_size": 24},
    "dinov2": {**VISION, "mlp_ratio": 2, "use_swiglu_ffn": False, "layerscale_value": 0.5, "drop_path_rate": 0.0},
}
SEQ2SEQ = {
    "marian": {
        "vocab_size": 45,
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "max_position_embeddings": 48,
        "decoder_start_token_id": 44,
        "pad_token_id": 44,
        "scale_embedding": True,
        "init_std": 0.02,
    },
    "t5": {
        "vocab_size": 45,
        "d_model": 16,
        "d_kv": 6,
        "d_ff": 24,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
        "feed_forward_proj": "gated-gelu",
        "decoder_start_token_id": 0,
        "initializer_factor": 1.0,
    },
}
HEADS = {name: tuple(find_family({"model_type": name}, "").heads) for name in FAMILIES}
DECODERS = [name for name in FAMILIES if "causal_lm" in HEADS[name]]
IMAGES = [name for name in FAMILIES if "image_classification" in HEADS[name]]
OTHERS = [name for name in FAMILIES if name not in SEQ2SEQ]  # which classify
TEXTS = [name for name in OTHERS if name not in IMAGES]
ENCODERS = [name for name in TEXTS if name not in DECODERS]
LEARNED = [*ENCODERS, "gpt2"]  # positions are looked up in a table


def config_of(name: str, **changes) -> dict:
    """A small `config.json` of a model type."""
    return {**{**OWN, **SEQ2SEQ}.get(name, TINY), "model_type": name, **changes}


def head_of(name: str) -> Head:
    """A head that a model type has, on documents if it can be."""
    return Head("seq2seq", 0) if name in SEQ2SEQ else PIXELS if name in IMAGES else HEAD


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n in FAMILIES for k in HEADS[n]])
def test_the_table_covers_the_template(name, kind):
    """C31: each parameter has exactly one row, each row a parameter, and no part of a tensor on disk is used twice."""
    model = build_model(config_of(name), Head(kind, 3), name)
    assert sorted(row.ours for row in model.table.rows) == sorted(model.template.keys)
    theirs = [(row.theirs, row.part) for row in model.table.rows]
    assert len(set(theirs)) == len(theirs)
    assert {name for name, part in theirs if part} & {name for name, part in theirs if not part} == set()
    assert all("{i}" not in row.ours + row.theirs for row in model.table.rows)


def test_a_table_that_misses_a_parameter_is_a_failure(monkeypatch):
    """C31: negative control: with one row less, the model is not built at all."""
    from sft_jax.models import bert

    monkeypatch.setattr(bert, "linear", lambda *a, **k: ())
    with pytest.raises(AssertionError, match="head/dense/bias"):
        build_model(config_of("bert"), HEAD, "bert")


@pytest.mark.parametrize("name", FAMILIES)
def test_axes_name_every_dimension(name):
    """R13: the logical axes of a parameter are as many as it has dimensions, in names that the mesh knows."""
    model = build_model(config_of(name), head_of(name), name)
    shapes = model.template.shapes
    assert {p: len(axes) for p, axes in model.table.axes.items()} == {p: len(shape) for p, shape in shapes.items()}
    assert {a for axes in model.table.axes.values() for a in axes} <= {"vocab", "embed", "heads", "mlp", "."}
    if name == "resnet":
        return
    side = "decoder/" if name in SEQ2SEQ else ""
    assert model.table.axes[f"{side}blocks/1/attn/q/kernel"] == ("embed", "heads")
    assert model.table.axes[f"{side}blocks/1/mlp/down/kernel"] == ("mlp", "embed")


@pytest.mark.parametrize("name", TEXTS)
def test_sizes_come_from_the_configuration(name):
    """R30: shapes are those that `config.json` says, with the outputs that the task asks for."""
    shapes = build_model(config_of(name), HEAD, name).template.shapes
    assert shapes["embed/word/embedding"] == (45, 16)
    assert shapes["blocks/0/mlp/up/kernel"] == (16, 24)
    assert shapes["head/out/kernel"] == (16, 3) and shapes.get("head/out/bias", (3,)) == (3,)
    assert ("head/out/bias" in shapes) == (name in ENCODERS)
    assert ("embed/type/embedding" in shapes) == (name in ENCODERS and name != "distilbert")
    assert ("embed/position/embedding" in shapes) == (name in LEARNED)
    assert {p.split("/")[1] for p in shapes if p.startswith("blocks/")} == {"0", "1"}


@pytest.mark.parametrize("name", OTHERS)
def test_models_share_one_form(name):
    """C24: every family gives logits for each document slot, in float32, and lives in one file with one `FAMILY`.

    Of images there is one a row. What a head reads can be computed apart.
    """
    model = build_model(config_of(name), head_of(name), name)
    params = model.template.initial(jax.random.key(0), model.template.keys)
    tokens = np.ones((2, 5), np.int32)
    batch = dict.fromkeys(("input_ids", "token_type_ids", "position_ids"), 0 * tokens) | {"segment_ids": tokens}
    slots = 1 if name in IMAGES else 4
    starts, pixels = np.zeros((2, slots), np.int32), np.zeros((2, 12, 12, 3), np.float32)
    batch |= {"starts": starts, "ends": starts, "weight": starts, "pixel_values": pixels}
    logits = jax.eval_shape(lambda p: model.template.bind(p)(batch), params)
    assert logits.shape == (2, slots, 3) and logits.dtype == np.float32
    features = jax.eval_shape(lambda p: model.template.bind(p).features(batch, None), params)
    assert features.shape == (2, slots, 32 if name == "dinov2" else 16)
    assert importlib.import_module(f"sft_jax.models.{FAMILIES[name]}").FAMILY is find_family({"model_type": name}, "")
    assert name in find_family({"model_type": name}, "").classes


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        (
            "bert",
            {"position_embedding_type": "relative_key"},
            "position_embedding_type='relative_key' is not supported",
        ),
        ("roberta", {"position_embedding_type": "relative_key_query"}, "only 'absolute' is"),
        ("bert", {"is_decoder": True}, "is_decoder=True is not supported; only False is"),
        ("roberta", {"add_cross_attention": True}, "add_cross_attention=True is not supported"),
        ("distilbert", {"sinusoidal_pos_embds": True}, "sinusoidal_pos_embds=True is not supported"),
        ("bert", {"hidden_act": "gelu_neww"}, "activation 'gelu_neww' is not supported; did you mean 'gelu_new'?"),
        ("distilbert", {"activation": "mish"}, f"(known: {', '.join(ACTIVATIONS)})"),
        ("bert", {"num_attention_heads": 3}, "hidden size 16 is not divisible by 3 heads"),
        ("bert", {"model_type": "brt"}, "model type 'brt' is not supported; did you mean 'bert'?"),
        ("bert", {"model_type": "distil-bert"}, "did you mean 'distilbert'?"),
        ("bert", {"model_type": None}, f"(known: {', '.join(FAMILIES)})"),
        ("roberta", {"pad_token_id": None}, "pad_token_id"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True is not supported"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not supported"),
        ("gpt2", {"n_head": 3}, "hidden size 16 is not divisible by 3 heads"),
        ("llama", {"num_key_value_heads": 3}, "4 heads are not divisible by 3 key/value heads"),
        ("llama", {"head_dim": 5}, "5 dimensions of each head would be turned, expected an even number"),
        ("llama", {"rope_scaling": {"type": "yarm", "factor": 2}}, "'yarm' is not supported; did you mean 'yarn'?"),
        ("llama", {"rope_parameters": {"rope_type": "proportional"}}, "rope type 'proportional' is not supported"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope factor is None, expected a number above 0"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported for llama"),
        (
            "phi3",
            {"rope_scaling": {"type": "su", "short_factor": [1.0]}},
            "rope short_factor must be 2 numbers above 0",
        ),
        ("qwen2", {"layer_types": ["full_attention"]}, "expected 2 times one of: full_attention, sliding_attention"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 2}, "names sliding layers, but there is no sliding_window"),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "of their own for full_attention"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported"),
        ("resnet", {"layer_type": "botleneck"}, "layer_type 'botleneck' is not supported; did you mean 'bottleneck'?"),
        ("resnet", {"depths": [2]}, "2 hidden_sizes and depths (2,), expected as many of both"),
        ("resnet", {"depths": [2, 0]}, "depths is (2, 0), expected whole numbers of at least 1"),
        ("resnet", {"hidden_sizes": 5}, "hidden_sizes is 5, expected a list of whole numbers"),
        (
            "vit",
            {"image_size": [12, 16]},
            "image_size is [12, 16], expected a whole number: only squares are supported",
        ),
        ("vit", {"patch_size": 16}, "no patch of 16 pixels is in an image of 12"),
        ("vit", {"num_attention_heads": 3}, "hidden size 16 is not divisible by 3 heads"),
        ("dinov2", {"mlp_ratio": 0.5}, "mlp_ratio is 0.5, expected int"),
        ("dinov2", {"drop_path_rate": 1.5}, "drop_path is 1.5, expected float of at least 0 and at most 1"),
        ("marian", {"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings=False is not"),
        ("marian", {"encoder_layerdrop": 0.1}, "encoder_layerdrop=0.1 is not supported; only 0.0 is"),
        ("marian", {"d_model": 18}, "hidden size 18 is not divisible by 4 heads"),
        ("marian", {"decoder_attention_heads": 2}, "decoder_attention_heads=2 is not supported; only 4 is"),
        ("marian", {"decoder_start_token_id": 45}, "decoder_start_token_id is 45, of 45 tokens"),
        ("t5", {"feed_forward_proj": "gated-mish"}, "activation 'mish' is not supported"),
        ("t5", {"feed_forward_proj": "gated-gelu-x"}, "feed_forward_proj is 'gated-gelu-x'"),
        ("t5", {"relative_attention_num_buckets": 3}, "relative_attention_num_buckets is 3, expected at least 4"),
        # What `transformers` reads in all models, or by another name.
        ("bert", {"per_layer_config": {"0": {"hidden_size": 8}}}, "per_layer_config="),
        ("llama", {"transformers_weights": "other.safetensors"}, "transformers_weights='other.safetensors' is not"),
        ("llama", {"token_classification_bias": False}, "token_classification_bias=False is not supported"),
        ("marian", {"is_causal": False}, "is_causal=False is not supported; only True is"),
        ("t5", {"is_causal": None}, "is_causal=None is not supported; only True is"),
        ("t5", {"is_gated_act": False}, "is_gated_act=False is not supported; only True is"),
        ("t5", {"dense_act_fn": "relu"}, "dense_act_fn='relu' is not supported; only 'gelu_new' is"),
        ("marian", {"decoder_vocab_size": 44}, "decoder_vocab_size=44 is not supported; only 45 is"),
        ("vit", {"head_dim": 2}, "head_dim=2 is not supported; only 4 is"),
        ("gpt2", {"hidden_size": 8}, "hidden_size is 8 and n_embd 16, which are two names of one thing"),
        ("t5", {"num_hidden_layers": 3}, "num_hidden_layers is 3 and num_layers 2, which are two names of one thing"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(name, changes, said):
    """C26: a setting that we do not compute is an error that names it, never ignored."""
    with pytest.raises(ModelError) as error:
        build_model(config_of(name, **changes), head_of(name), "some/where")
    assert said in str(error.value)
    build_model(config_of(name), head_of(name), "some/where")


@pytest.mark.parametrize("key", ["vocab_size", "num_hidden_layers", "intermediate_size", "type_vocab_size"])
def test_a_missing_size_is_named(key):
    """C26: a `config.json` without a size names it; nothing is guessed."""
    config = {k: v for k, v in config_of("bert").items() if k != key}
    with pytest.raises(ModelError, match=f"some/where: config.json lacks '{key}'"):
        build_model(config, HEAD, "some/where")


def test_an_unknown_head_is_named():
    """C26: a kind of head that the family lacks is an error that lists those there are."""
    with pytest.raises(ModelError, match="bert has no head 'poetry'; it has: sequence_classification"):
        build_model(config_of("bert"), Head("poetry", 2), "some/where")


@pytest.mark.parametrize("name", FAMILIES)
def test_nonsense_in_a_configuration_is_an_error_of_ours(name):
    """R33: whatever stands in a `config.json`, building the model succeeds or raises our error and no other."""
    sound = config_of(name)
    for key in sound:
        for value in (None, "16", -1, 0, 1.5, [], {"a": 1}, True):
            try:
                build_model({**sound, key: value}, head_of(name), "some/where")
            except ModelError as error:
                assert len(str(error).splitlines()) == 1, error


@pytest.mark.parametrize("name", ["roberta", "xlm-roberta", "camembert"])
@pytest.mark.parametrize("pad", [0, 1, 5])
def test_the_longest_document_of_roberta(name, pad):
    """C9: RoBERTa's positions begin after its padding id, so that many fewer tokens fit; BERT's all count."""
    model = build_model(config_of(name, pad_token_id=pad), HEAD, name)
    assert model.max_length == TINY["max_position_embeddings"] - pad - 1
    assert model.config.position_offset == pad + 1
    assert build_model(config_of("bert", pad_token_id=pad), HEAD, "bert").max_length == TINY["max_position_embeddings"]


@pytest.mark.parametrize("name", LEARNED)
def test_the_longest_document_has_a_position(name):
    """C9: at the longest length the last token reads the last position there is, and one token more reads none."""
    model = build_model(config_of(name, pad_token_id=1), HEAD, name)
    params = model.template.initial(jax.random.key(0), model.template.keys)

    def logits(length: int) -> np.ndarray:
        ids = np.full((1, length), 3, np.int32)
        batch = {"input_ids": ids, "token_type_ids": 0 * ids, "segment_ids": 0 * ids + 1}
        batch |= {"position_ids": np.arange(length, dtype=np.int32)[None], "starts": np.zeros((1, 1), np.int32)}
        batch["ends"] = batch["starts"] + length - 1
        return np.asarray(model.template.bind(params)(batch))

    assert np.isfinite(logits(model.max_length)).all()
    assert not np.isfinite(logits(model.max_length + 1)).all()


def test_rotary_positions_have_no_table():
    """C9: rotary positions end where the model was trained, times the factor that dynamic ones grow by."""
    plain, grown = {"rope_scaling": None}, {"rope_scaling": {"type": "dynamic", "factor": 3.0}}
    assert build_model(config_of("llama", **plain), HEAD, "llama").max_length == 48
    assert build_model(config_of("llama", **grown), HEAD, "llama").max_length == 144


@pytest.mark.parametrize("name", ENCODERS)
def test_rates_of_dropout(name):
    """C26: dropout is that of `config.json`, each rate in its own place, unless one rate is given for all."""
    own = (
        {"dropout": 0.11, "attention_dropout": 0.12, "seq_classif_dropout": 0.13}
        if name == "distilbert"
        else {"hidden_dropout_prob": 0.11, "attention_probs_dropout_prob": 0.12, "classifier_dropout": 0.13}
    )
    kept = build_model(config_of(name, **own), HEAD, name).config
    assert (kept.dropout, kept.attention_dropout, kept.head_dropout) == (0.11, 0.12, 0.13)
    given = build_model(config_of(name, **own), HEAD, name, dropout=0.0).config
    assert (given.dropout, given.attention_dropout, given.head_dropout) == (0.0, 0.0, 0.0)
    if name != "distilbert":
        plain = build_model(config_of(name, **{**own, "classifier_dropout": None}), HEAD, name).config
        assert plain.head_dropout == 0.11


@pytest.mark.parametrize(
    ("name", "own", "expected"),
    [
        (
            "gpt2",
            {"embd_pdrop": 0.1, "resid_pdrop": 0.2, "attn_pdrop": 0.3, "hidden_dropout": 0.4},
            (0.1, 0.2, 0.3, 0.4),
        ),
        ("llama", {"attention_dropout": 0.3, "classifier_dropout": 0.0}, (0.0, 0.0, 0.3, 0.0)),
        ("phi3", {"resid_pdrop": 0.2, "embd_pdrop": 0.9}, (0.0, 0.2, 0.0, 0.1)),
        ("gemma3_text", {"attention_dropout": 0.3}, (0.0, 0.0, 0.3, 0.1)),
    ],
)
def test_rates_of_dropout_of_decoders(name, own, expected):
    """C26: each rate that the reference uses in its own place; one rate for all changes those alone."""
    kept = build_model(config_of(name, **own), HEAD, name).config
    assert (kept.embed_dropout, kept.dropout, kept.attention_dropout, kept.head_dropout) == expected
    given = build_model(config_of(name, **own), HEAD, name, dropout=0.5).config
    assert given.attention_dropout == given.head_dropout == 0.5


def test_a_tied_head_is_the_embeddings():
    """C31: tied, the head has no parameter and no tensor on disk, and a copy in the checkpoint is passed over."""
    tied, untied = (
        build_model(config_of("llama", tie_word_embeddings=t), Head("causal_lm", 0), "llama") for t in (True, False)
    )
    assert untied.template.shapes["head/embedding"] == (45, 16)
    assert not any(path.startswith("head/") for path in tied.template.keys)
    assert not any(row.theirs == "lm_head.weight" for row in tied.table.rows)
    held = {row.theirs: untied.template.shapes[row.ours][::-1] for row in untied.table.rows}
    held |= {n: s[::-1] for n, s in held.items() if n.endswith(("embed_tokens.weight", "lm_head.weight"))}
    matched = match(tied.table, tied.template.shapes, held, "here")
    assert matched.ignored == ("lm_head.weight",) and not matched.initialised


@pytest.mark.parametrize("name", [*TEXTS, "vit", "dinov2"])
def test_new_weights_have_the_spread_of_the_configuration(name):
    """C23: what is drawn anew has the standard deviation that `initializer_range` says."""
    model = build_model(config_of(name, initializer_range=0.05), head_of(name), name)
    drawn = model.template.initial(jax.random.key(0), ["blocks/1/attn/q/kernel", "blocks/0/mlp/up/kernel"])
    for values in map(np.asarray, drawn.values()):
        assert math.isclose(values.std(), 0.05, rel_tol=0.25)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_encoder_decoders_have_one_form(name):
    """R30 C24: sizes are those of `config.json`, and every token of a target has logits over the vocabulary."""
    model = build_model(config_of(name), head_of(name), name)
    shapes = model.template.shapes
    assert shapes["embed/word/embedding"] == (45, 16)
    assert {path.split("/")[2] for path in shapes if path.startswith("decoder/blocks/")} == {"0", "1"}
    assert not any(path.startswith("encoder/blocks/0/cross") for path in shapes)
    params = model.template.initial(jax.random.key(0), model.template.keys)
    source, target = (np.ones((2, count), np.int32) for count in (5, 7))
    batch = {"input_ids": source, "segment_ids": source, "position_ids": source}
    batch |= {f"decoder_{key}": target for key in batch}
    logits = jax.eval_shape(lambda p: model.template.bind(p)(batch).dense(), params)
    assert logits.shape == (2, 7, 45) and logits.dtype == np.float32
    assert model.limits["input_ids"] == model.limits["decoder_input_ids"] == 45
    assert model.max_length == (48 if name == "marian" else NO_LIMIT)


@pytest.mark.parametrize(("name", "path", "std"), [
    ("marian", "decoder/blocks/1/cross/q/kernel", 0.02),
    ("marian", "embed/word/embedding", 0.02),
    ("t5", "encoder/blocks/1/attn/q/kernel", (16 * 6) ** -0.5),
    ("t5", "decoder/blocks/0/cross/k/kernel", 16**-0.5),
    ("t5", "decoder/blocks/0/attn/o/kernel", 24**-0.5),
    ("t5", "encoder/blocks/0/mlp/down/kernel", 24**-0.5),
    ("t5", "embed/word/embedding", 1.0),
])  # fmt: skip
def test_new_weights_of_encoder_decoders(name, path, std):
    """C23: what is drawn anew has the spread that the reference draws it with, which T5 has by the layer's inputs."""
    drawn = build_model(config_of(name), head_of(name), name).template.initial(jax.random.key(0), [path])
    assert math.isclose(np.asarray(drawn[path]).std(), std, rel_tol=0.25)


@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (16, 128), (7, 20), (8, 11), (12, 100)])
def test_buckets_of_distances(buckets, most):
    """R57: each distance has a bucket, nearer ones never a later one than farther ones; the farthest has the last."""
    found = distance_buckets(buckets, most)
    assert found[: buckets // 2].tolist() == list(range(buckets // 2)) and (np.diff(found) >= 0).all()
    assert found[-1] == buckets - 1 and len(found) == most + 1


def test_sinusoids_of_odd_sizes():
    """R57: sines come first and cosines after, one sine more than cosines where the size is odd."""
    for size in (6, 7):
        found = sinusoids(5, size)
        assert found.shape == (5, size) and np.allclose(found[0], [0] * -(-size // 2) + [1] * (size // 2))
        assert np.allclose(found[:, 0], np.sin(np.arange(5)), atol=1e-6)
