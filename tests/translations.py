"""What tests of encoder-decoders share: tiny Marian and T5 checkpoints with tokenizers of their own, and made-up pairs.

A sentence is translated word by word, the words in reverse order, so a model can learn it.
"""

import json
from functools import lru_cache
from pathlib import Path

import jax
import numpy as np
from conftest import WORDS
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from sft_jax.models.family import Head, build_model
from sft_jax.weights.files import write_checkpoint
from sft_jax.weights.table import save

MARIAN = {
    "model_type": "marian",
    "architectures": ["MarianMTModel"],
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 24),
    "max_position_embeddings": 48,
    "activation_function": "swish",
    "scale_embedding": True,
    "static_position_embeddings": True,
    "is_encoder_decoder": True,
    "dropout": 0.0,
    "init_std": 0.25,
}
T5 = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "vocab_size": 3 + 2 * len(WORDS),
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "is_encoder_decoder": True,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}


def translated(text: str) -> str:
    """What a made-up sentence is in the other language."""
    return " ".join(word[::-1] for word in reversed(text.split()))


def pairs(count: int, seed: int = 0, longest: int = 6) -> list[tuple[str, str]]:
    """Made-up sentences with their translations."""
    draw = np.random.default_rng(seed)
    texts = [" ".join(draw.choice(WORDS, size=int(draw.integers(1, longest + 1)))) for _ in range(count)]
    return [(text, translated(text)) for text in texts]


def write_pairs(file: Path, count: int, seed: int = 0) -> Path:
    """JSON lines of made-up pairs, with an id."""
    rows = [{"id": n, "source": a, "target": b} for n, (a, b) in enumerate(pairs(count, seed))]
    more = ({"twice": f"{row['target']} {row['target']}", "long": f"{row['target']} " * 25} for row in rows)
    lines = (json.dumps({**row, **others}) + "\n" for row, others in zip(rows, more, strict=True))
    file.write_text("".join(lines), encoding="utf-8")
    return file


@lru_cache(maxsize=1)
def spm_pair() -> tuple[bytes, bytes, dict[str, int]]:
    """(source.spm, target.spm, the ids of their pieces), trained here."""
    import io

    import sentencepiece

    trained = []
    for side in zip(*pairs(200), strict=True):
        sink = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(side), model_writer=sink, vocab_size=60, bos_id=-1, minloglevel=2
        )
        trained.append(sink.getvalue())
    pieces = [sentencepiece.SentencePieceProcessor(model_proto=proto) for proto in trained]
    names = {model.id_to_piece(number) for model in pieces for number in range(len(model))}
    ordered = ["</s>", "<unk>", *sorted(names - {"</s>", "<unk>"}), ">>fr<<", "<pad>"]
    return trained[0], trained[1], {name: number for number, name in enumerate(ordered)}


def write_marian(directory: Path, seed: int = 0, **changes) -> Path:
    """A random Marian checkpoint with its pair of SentencePiece models."""
    source, target, ids = spm_pair()
    ends = {"eos_token_id": 0, "forced_eos_token_id": 0, "bad_words_ids": [[ids["<pad>"]]]}
    pad = dict.fromkeys(("pad_token_id", "decoder_start_token_id"), ids["<pad>"])
    config = {**MARIAN, "vocab_size": len(ids), "decoder_vocab_size": len(ids), **pad, **ends, **changes}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "source.spm").write_bytes(source)
    (directory / "target.spm").write_bytes(target)
    (directory / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    settings = {"tokenizer_class": "MarianTokenizer", "source_lang": "a", "target_lang": "b", "model_max_length": 48}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return _with_weights(directory, config, seed)


def write_t5(directory: Path, seed: int = 0, **changes) -> Path:
    """A random T5 checkpoint with a tokenizer of whole words."""
    names = ["<pad>", "</s>", "<unk>", *WORDS, *(word[::-1] for word in WORDS)]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return _with_weights(directory, {**T5, **changes}, seed)


def _with_weights(directory: Path, config: dict, seed: int) -> Path:
    model = build_model(config, Head("seq2seq", 0), "tiny")
    params = model.template.initial(jax.random.key(seed), model.template.keys)
    write_checkpoint(directory, config, save(model.table, {p: np.asarray(a) for p, a in params.items()}))
    return directory
