"""GGUF files as checkpoints: found, opened and read as a directory is, and refused by name where not understood."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize
from made_gguf import EACH, GROUPS, HEADS, MORE, WIDTH, WORDS, tensors, write_gguf

from sft_jax.errors import ConfigError, ModelError
from sft_jax.gguf import read_header
from sft_jax.models.family import Head, build_model, load_model
from sft_jax.run import prepare
from sft_jax.weights.files import find, open_checkpoint
from sft_jax.weights.gguf import READABLE
from sft_jax.weights.llamacpp import ARCHITECTURES, restore


def refused(file) -> str:
    """What opening a file ends with."""
    with pytest.raises(ModelError) as error:
        open_checkpoint(file)
    return str(error.value)


def test_opens_as_a_directory_does(tmp_path):
    """R57: metadata becomes the settings of `config.json`, in shortest decimals, and names those of Hugging Face."""
    held = write_gguf(tmp_path / "model.gguf")
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    assert checkpoint.config == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 64,
        "hidden_size": WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": EACH,
        "rms_norm_eps": 1e-05,
        "rope_theta": 5000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": WORDS,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "pad_token_id": 2,
    }
    assert len(checkpoint.shapes) == len(held) and "lm_head.weight" not in checkpoint.shapes
    assert checkpoint.shapes["model.layers.0.self_attn.k_proj.weight"] == (GROUPS * EACH, WIDTH)
    np.testing.assert_array_equal(checkpoint.read("model.embed_tokens.weight"), held["token_embd.weight"])
    assert checkpoint.digest().keys() == {"model.gguf"}


def test_ends_of_a_text_and_of_a_turn(tmp_path):
    """C5: where a file names a token that ends a turn besides the one that ends a text, both are in the settings."""
    write_gguf(tmp_path / "model.gguf", tokenizer={"eot_token_id": 2, "padding_token_id": None})
    config = open_checkpoint(tmp_path / "model.gguf").config
    assert config["eos_token_id"] == [0, 2] and "pad_token_id" not in config


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of queries and keys."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def test_rotary_pairs_are_put_back(tmp_path):
    """R57: queries and keys come back in the order they had; values, and other architectures, are left alone."""
    made = tensors("llama")
    changed = dict(made)
    for name, heads in (("blk.1.attn_q.weight", HEADS), ("blk.1.attn_k.weight", GROUPS)):
        changed[name] = interleaved(made[name], heads)
        assert not np.array_equal(changed[name], made[name])
    write_gguf(tmp_path / "model.gguf", numbers=changed)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    for letter in "qkv":
        ours = checkpoint.read(f"model.layers.1.self_attn.{letter}_proj.weight")
        np.testing.assert_array_equal(ours, made[f"blk.1.attn_{letter}.weight"])
    said = {"attention.head_count": HEADS, "attention.head_count_kv": GROUPS}
    query = made["blk.1.attn_q.weight"]
    assert restore(ARCHITECTURES["qwen2"], "blk.1.attn_q.weight", query, said) is query


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_tensors_are_unpacked(kind, tmp_path):
    """R57: what is quantised reads as float32, near what it was, and as `gguf` itself unpacks it."""
    made = write_gguf(tmp_path / "model.gguf", kinds={"blk.0.ffn_up.weight": kind})
    ours = open_checkpoint(tmp_path / "model.gguf").read("model.layers.0.mlp.up_proj.weight")
    number = GGMLQuantizationType[kind]
    np.testing.assert_array_equal(ours, dequantize(quantize(made["blk.0.ffn_up.weight"], number), number))
    assert ours.dtype == np.float32 and 0 < np.abs(ours - made["blk.0.ffn_up.weight"]).max() < 0.4


@pytest.mark.parametrize("kind", [kind.name for kind in GGML_QUANT_SIZES if kind.name.endswith("_K")])
def test_blocks_of_256(kind, tmp_path):
    """R57: the K-quants, which nothing here can write, read as `gguf` unpacks any bytes of theirs, or are refused."""
    number = GGMLQuantizationType[kind]
    block, size = GGML_QUANT_SIZES[number]
    packed = np.random.default_rng(0).integers(0, 60, (4, size), np.uint8)
    made = {**tensors("llama"), "blk.0.ffn_down.weight": packed}
    write_gguf(tmp_path / "model.gguf", numbers=made, kinds={"blk.0.ffn_down.weight": kind})
    if kind not in READABLE:
        assert f"blk.0.ffn_down.weight: has type {kind}, not one of F32, F16" in refused(tmp_path / "model.gguf")
        return
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    assert checkpoint.shapes["model.layers.0.mlp.down_proj.weight"] == (4, block)
    ours = checkpoint.read("model.layers.0.mlp.down_proj.weight")
    np.testing.assert_array_equal(ours, dequantize(packed, number))


def test_an_untied_head(tmp_path):
    """C31: a file with a head of its own is untied, and one without is tied."""
    head = np.ones((WORDS, WIDTH), np.float32)
    write_gguf(tmp_path / "model.gguf", numbers={**tensors("llama"), "output.weight": head})
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    assert not checkpoint.config["tie_word_embeddings"] and checkpoint.shapes["lm_head.weight"] == head.shape


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope.scaling.type": "yarn"}, "llama.rope.scaling.type: 'yarn' is not supported; only 'none' is"),
        ({"expert_count": 8}, "llama.expert_count: 8 is not supported; only 0 is"),
        ({"rope.dimension_count": 4}, "llama.rope.dimension_count: 4, where a head has 8"),
        ({"block_count": 3}, "tensors of 2 blocks, where block_count is 3"),
        ({"block_count": None}, "llama.block_count: None, expected a whole number above 0"),
        ({"embedding_length": 2.5}, "llama.embedding_length: 2.5, expected a whole number above 0"),
        ({"embedding_length": 64, "rope.dimension_count": 16}, "token_embd.weight: expected rows of 64 numbers"),
        ({"attention.head_count": 0}, "llama.attention.head_count: 0, expected a whole number above 0"),
        ({"attention.head_count_kv": [2, 1]}, "llama.attention.head_count_kv: array([2, 1]"),
        ({"attention.head_count_kv": 3}, "blk.0.attn_k.weight: 16 rows are not those of 3 heads"),
        ({"rope.freq_base": "big"}, "llama.rope.freq_base: 'big', expected a number above 0"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon: nan, expected a number above 0"),
        ({"context_length": True}, "llama.context_length: True, expected a whole number above 0"),
    ],
)
def test_settings_that_are_not_understood(changes, said, tmp_path):
    """C26: what would make another model of it is refused by name, as is what contradicts the tensors."""
    write_gguf(tmp_path / "model.gguf", metadata=changes)
    message = refused(tmp_path / "model.gguf")
    assert message.startswith(f"{tmp_path / 'model.gguf'}: ") and said in message


def test_an_unknown_architecture(tmp_path):
    """R29: an architecture that is not read is named, with the nearest that is."""
    write_gguf(tmp_path / "model.gguf", "llama4")
    message = refused(tmp_path / "model.gguf")
    assert "architecture 'llama4' is not read from GGUF files; did you mean 'llama'? (known: llama, qwen2, " in message


def test_tensors_that_are_not_understood(tmp_path):
    """C26: factors of rotary scaling and adapters are refused by name, and all at once."""
    extra = {"rope_freqs.weight": np.ones(4, np.float32), "blk.0.attn_q.weight.lora_a": np.ones(4, np.float32)}
    write_gguf(tmp_path / "model.gguf", numbers={**tensors("llama"), **extra})
    message = refused(tmp_path / "model.gguf")
    assert "2 problems" in message and all(
        f"'{name}': a tensor that this architecture does not" in message for name in extra
    )


def test_found_by_file_and_by_directory(tmp_path):
    """R29: a GGUF file is named by itself or as the only one of a directory without safetensors."""
    home = tmp_path / "home"
    home.mkdir()
    write_gguf(home / "a.gguf")
    assert find(str(home)) == find(str(home / "a.gguf")) == home / "a.gguf"
    write_gguf(home / "b.gguf")
    with pytest.raises(ModelError, match=r"holds 2 GGUF files \(a\.gguf, b\.gguf\); give the one that is meant"):
        find(str(home))
    (home / "model.safetensors").touch()
    assert find(str(home)) == home
    with pytest.raises(ModelError, match=r"c\.gguf': no such directory; give a directory, a GGUF file"):
        find("c.gguf")


def test_a_link_out_of_a_directory(tmp_path):
    """R32: the GGUF file of a directory may not be a link to another place; one that is named itself may."""
    write_gguf(tmp_path / "model.gguf")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "linked.gguf").symlink_to(tmp_path / "model.gguf")
    with pytest.raises(ModelError, match=r"linked\.gguf: is a link to another place"):
        find(str(tmp_path / "home"))
    assert open_checkpoint(find(str(tmp_path / "home" / "linked.gguf"))).shapes


@pytest.mark.parametrize("architecture", list(MORE))
def test_opening_reads_the_header_alone(architecture, tmp_path):
    """R30: a file is opened by its header; a tensor is read when it is asked for, and then its end must be there."""
    file = tmp_path / "model.gguf"
    write_gguf(file, architecture)
    checkpoint = open_checkpoint(file)
    last = max(read_header(file).tensors.items(), key=lambda entry: entry[1].begin)
    with open(file, "r+b") as cut:
        cut.truncate(last[1].begin + 1)
    with pytest.raises(ModelError, match=rf"model\.gguf: ends within {last[0]}; fetch it again"):
        for name in checkpoint.shapes:
            checkpoint.read(name)


@pytest.mark.parametrize("architecture", list(MORE))
def test_every_architecture_is_a_family_of_ours(architecture, tmp_path):
    """R57: of each architecture that is read, a model of ours takes all tensors, and nothing is left over."""
    write_gguf(tmp_path / "model.gguf", architecture)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    matched, params = load_model(build_model(checkpoint.config, Head("causal_lm", 0), "model.gguf"), checkpoint)
    assert not matched.initialised and not matched.ignored
    assert set(matched.loaded.values()) == set(checkpoint.shapes) and len(params) == len(matched.loaded)


def test_a_run_begins_with_a_file(tmp_path, configure):
    """R29: `model.source` may be a GGUF file, or its directory; one that is not there is found at once."""
    write_gguf(tmp_path / "model.gguf")
    for source in (tmp_path / "model.gguf", tmp_path):
        run = prepare(configure(f"model.source={source}", "data.max_length=40"))
        assert run.checkpoint.directory == tmp_path / "model.gguf" and len(run.data["train"])
    assert run.matched.loaded["blocks/0/attn/q/kernel"] == "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(ConfigError, match=r"model\.source: no directory '.*b\.gguf'; give a directory, a GGUF file"):
        configure(f"model.source={tmp_path / 'b.gguf'}")
