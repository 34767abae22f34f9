"""What the files beside `tokenizer.json` change in a tokenizer: the same as `transformers` 5 makes of them.

`AutoTokenizer` picks a class by the type of the model and by what the files name. A class that is its own builds its
tokenizer anew: of `tokenizer.json` it takes the vocabulary and, some of them, the post-processor, and all else from
`tokenizer_config.json` or from its defaults; the general class takes `tokenizer.json` as it is. Both then add the
tokens that the other files name. A class that is not built here is refused by name, and so is one that is for another
kind of vocabulary. Nothing in a directory is run, and `transformers` is not imported.
"""

import base64
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors

from sft_jax.errors import ModelError

GENERAL = "TokenizersBackend"
GENERAL_NAMES = (GENERAL, "PreTrainedTokenizerFast", "PreTrainedTokenizer", "PythonBackend", "PreTrainedTokenizerBase")
# Model type -> the class that is registered for it; a type that is not here has none, or the general one.
REGISTERED = {
    **dict.fromkeys(("bert", "distilbert"), "BertTokenizer"),
    "roberta": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "camembert": "CamembertTokenizer",
    "gpt2": "GPT2Tokenizer",
    **dict.fromkeys(("qwen2", "qwen3"), "Qwen2Tokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), "GemmaTokenizer"),
    "t5": "T5Tokenizer",
    "mistral": GENERAL,
    "phi3": GENERAL,
}
WHATEVER_IS_SAID = ("qwen2", "phi3")  # their files are known to name a wrong class
# Classes of `transformers` that build a tokenizer of their own, and none that is here: their names before "Tokenizer".
OTHERS = (
    "Albert", "Barthez", "Bartpho", "BertGeneration", "BertJapanese", "Bertweet", "BigBird", "BioGpt",
    "BlenderbotSmall", "Blenderbot", "ByT5", "CLIP", "CTRL", "Canine", "Clvp", "CodeGen", "CodeLlama", "Cohere",
    "CpmAnt", "Cpm", "DPRContextEncoder", "DPRQuestionEncoder", "DPRReader", "Deberta", "DebertaV2", "Dia", "Esm",
    "Esmc", "FNet", "FSMT", "FastSpeech2Conformer", "Flaubert", "Funnel", "GPTNeoXJapanese", "GPTNeoX", "GPTSw3",
    "Herbert", "Lasr", "LayoutLMv2", "LayoutLMv3", "LayoutXLM", "Luke", "M2M100", "MBart50", "MBart", "MLuke",
    "MPNet", "Marian", "MarkupLM", "Mgpstr", "MyT5", "Nllb", "Nougat", "OpenAIGPT", "PLBart", "Parakeet", "Pegasus",
    "Perceiver", "Phobert", "Pop2Piano", "ProphetNet", "Qwen3_5", "Rag", "Reformer", "RemBert", "RoCBert",
    "RoFormer", "SeamlessM4T", "Siglip2", "Siglip", "Speech2Text", "SpeechT5", "Splinter", "Tapas", "Tipsv2",
    "Udop", "VideoPrism", "Vits", "Wav2Vec2CTC", "Wav2Vec2PhonemeCTC", "Whisper", "XGLM", "XLM", "XLNet",
)  # fmt: skip
# Other names of those that are here.
ALIASES = {
    "BartTokenizer": "RobertaTokenizer",
    "ConvBertTokenizer": "BertTokenizer",
    "DistilBertTokenizer": "BertTokenizer",
    "ElectraTokenizer": "BertTokenizer",
    "MobileBertTokenizer": "BertTokenizer",
    "Phi3Tokenizer": "LlamaTokenizer",
    "SqueezeBertTokenizer": "BertTokenizer",
}
TYPED = ("bert", "roberta", "xlm-roberta", "camembert")  # types of models that read them, where they are told
WITHOUT_TYPES = ("DistilBertTokenizer",)  # those of them that do not tell the second text of a pair apart
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
BESIDE = ("special_tokens_map", "added_tokens")  # JSON files that are read beside the settings
SPACE = "▁"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MISTRAL_SIZE = 100_000  # tokens from which on `fix_mistral_regex` changes anything


@dataclass(frozen=True)
class Settled:
    """A tokenizer as `transformers` would have it, and what it does besides turning texts into ids."""

    fast: Any
    left: bool = False  # texts that are too long lose their beginning
    tidy: bool = False  # blanks before punctuation are taken out of what is decoded


@dataclass(frozen=True)
class Own:
    """A class of `transformers` that builds its tokenizer: the kind of its vocabulary, its names of special tokens, and
    what it sets, given the settings and the kept post-processor."""

    kind: str
    named: Mapping[str, str]
    build: Callable[[Tokenizer, Mapping[str, Any]], None]
    finish: Callable[[Tokenizer, Mapping[str, Any]], Any] | None = None  # its own post-processor
    types: bool = False
    extra: Callable[[Mapping[str, Any]], list[str]] = field(default=lambda settings: [])


def settle(
    fast: Tokenizer, settings: Mapping[str, Any], config: Mapping[str, Any], beside: Mapping[str, Any]
) -> Settled:
    """A tokenizer read from `tokenizer.json` under the settings of `tokenizer_config.json`, for a `config.json`.

    `beside` are the objects of `special_tokens_map.json` and `added_tokens.json`, by name, which are read where the
    settings list no added tokens.
    """
    name, said = class_of(fast, settings, config), str(settings.get("tokenizer_class")).removesuffix("Fast")
    kept = fast.get_added_tokens_decoder()
    listed = settings.get("added_tokens_decoder")
    settings = dict(settings)
    if "additional_special_tokens" in settings and not settings.get("extra_special_tokens"):
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")
    if isinstance(settings.get("extra_special_tokens"), Mapping):  # which are special by name
        settings[BY_NAME] = list(settings.pop("extra_special_tokens").values())
    if listed is None:
        settings |= {k: _token(v, special=True) for k, v in beside.get("special_tokens_map", {}).items()}
        added = _added(beside.get("added_tokens", {}), settings) | kept
    else:
        added = {int(number): _token(token) for number, token in listed.items()}
    own = OWN.get(name)
    cut, post, charsmap = fast.truncation, fast.post_processor, _charsmap(fast)
    if own:
        fast = Tokenizer(_model(fast, own, settings, name))
        settings = {"extra_special_tokens": own.extra(settings), **own.named, **settings}
        own.build(fast, {**settings, CHARSMAP: charsmap})
        fast.post_processor = post
    _add(fast, added, settings)
    if own and own.finish:
        fast.post_processor = own.finish(fast, settings)
    if settings.get("fix_mistral_regex") and fast.get_vocab_size() > MISTRAL_SIZE:
        raise ModelError("tokenizer_config.json: fix_mistral_regex=True is not supported; save the mended tokenizer")
    if settings.get("split_special_tokens"):
        raise ModelError("tokenizer_config.json: split_special_tokens=True is not supported; set it to false")
    names = settings.get("model_input_names")
    side = settings.get("truncation_side", cut["direction"] if cut else "right")
    if side not in ("left", "right"):
        raise ModelError(f"tokenizer_config.json: truncation_side is {side!r:.40}, expected left or right")
    forced = settings.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    tidy = bool(settings.get("clean_up_tokenization_spaces", False)) and (_kind(fast) != "BPE" or bool(forced))
    told = "token_type_ids" in names if isinstance(names, list) else own and own.types and said not in WITHOUT_TYPES
    if config.get("model_type") in TYPED and not told:
        fast = _without_types(fast)
    return Settled(fast, side == "left", tidy)


def tidied(text: str) -> str:
    """A decoded text without the blanks that `clean_up_tokenization_spaces` takes out."""
    for blank, plain in ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
                         (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")):  # fmt: skip
        text = text.replace(blank, plain)
    return text


def by_pieces(settings: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether the class is Marian's, which reads the files of SentencePiece and no `tokenizer.json`."""
    said = settings.get("tokenizer_class") or config.get("tokenizer_class")
    return said == "MarianTokenizer" or (said is None and config.get("model_type") == "marian")


def class_of(fast: Tokenizer, settings: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The class that `AutoTokenizer` picks, of those here; raises ModelError for one that builds a tokenizer of its own
    kind and is not here."""
    model_type = config.get("model_type")
    said = settings.get("tokenizer_class") or config.get("tokenizer_class")
    said = said.removesuffix("Fast") if isinstance(said, str) and said != "PreTrainedTokenizerFast" else said
    registered = REGISTERED.get(model_type) if isinstance(model_type, str) else None
    if said is None:
        name = registered or GENERAL
    elif (said == "LlamaTokenizer" and model_type not in WHATEVER_IS_SAID and _by_bytes(fast)) or registered == GENERAL:
        name = GENERAL
    else:
        name = registered if registered and model_type in WHATEVER_IS_SAID else said
    name = ALIASES.get(str(name), str(name))
    if name.removesuffix("Tokenizer") in OTHERS:
        raise ModelError(
            f"tokenizer_config.json: tokenizer_class {name} builds a tokenizer of its own, which is not supported; if "
            f"tokenizer.json is right as it is, set tokenizer_class to PreTrainedTokenizerFast there"
        )
    return name if name in OWN else GENERAL


def _by_bytes(fast: Tokenizer) -> bool:
    """Whether a tokenizer reads bytes as GPT-2 does."""
    return '"ByteLevel"' in json.dumps(json.loads(fast.to_str())["pre_tokenizer"])


def _kind(fast: Tokenizer) -> str:
    return type(fast.model).__name__


def _without_types(fast: Tokenizer) -> Tokenizer:
    """A tokenizer that gives both texts of a pair the same type, since its model is not told of types."""
    written = json.loads(fast.to_str())
    processor = written["post_processor"] or {"type": "TemplateProcessing", **BARE}
    written["post_processor"] = processor
    parts = [processor, *processor.get("processors", [])]
    places = [place for part in parts for side in ("single", "pair") for place in part.get(side, [])]
    for place in places:
        next(iter(place.values()))["type_id"] = 0
    return Tokenizer.from_str(json.dumps(written)) if places else fast


def _charsmap(fast: Tokenizer) -> bytes | None:
    """What a tokenizer says of characters, where it is of the kind that SentencePiece has."""
    written = json.loads(fast.normalizer.__getstate__()) if fast.normalizer else {}
    parts = [written, *written.get("normalizers", [])]
    found = next((part["precompiled_charsmap"] for part in parts if "precompiled_charsmap" in part), None)
    return found and base64.b64decode(found)


def _model(fast: Tokenizer, own: Own, settings: Mapping[str, Any], name: str) -> Any:
    """The vocabulary, under what the class says of unknown words."""
    if _kind(fast) != own.kind:
        raise ModelError(
            f"tokenizer.json: holds a {_kind(fast)}, and {name}, by which transformers reads it, is for a {own.kind}; "
            f"set tokenizer_class to PreTrainedTokenizerFast in tokenizer_config.json, which takes it as it is"
        )
    model: Any = fast.model
    if own.kind == "Unigram":
        written = json.loads(fast.to_str())["model"]
        unknown = str(_word(settings.get("unk_token")) or own.named["unk_token"])
        found = next((place for place, (piece, _) in enumerate(written["vocab"]) if piece == unknown), 0)
        number = {"XLMRobertaTokenizer": 3, "T5Tokenizer": 2}.get(name, found)
        if (written["unk_id"], written.get("byte_fallback", False)) != (number, False):
            whole = {**json.loads(fast.to_str()), "model": {**written, "unk_id": number, "byte_fallback": False}}
            model = Tokenizer.from_str(json.dumps(whole)).model
    return model


def _add(fast: Tokenizer, added: Mapping[int, AddedToken], settings: Mapping[str, Any]) -> None:
    """Give a tokenizer the tokens that it lacks: those listed, special ones by name, and others."""
    there = {repr(token) for token in fast.get_added_tokens_decoder().values()}
    wanted = [token for _, token in sorted(added.items()) if repr(token) not in there]
    known = {token.content for token in (*fast.get_added_tokens_decoder().values(), *wanted)}
    named = [settings[name] for name in NAMED if settings.get(name) is not None]
    more = [v for k, v in settings.items() if k.endswith("_token") and k not in NAMED and isinstance(v, str)]
    extra = [*more, *settings.get(BY_NAME, []), *(settings.get("extra_special_tokens") or [])]
    for token in (_token(token, special=True) for token in (*named, *extra)):
        if token.content not in known:
            wanted.append(token)
            known.add(token.content)
    words = {_word(token) for token in named}
    for token in wanted:
        token.special = token.special or token.content in words
    if wanted:
        fast.add_tokens(wanted)


def _added(listed: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    """The tokens of an `added_tokens.json`, which says nothing but their numbers."""
    special = {_word(settings.get(name)) for name in NAMED}
    special |= {_word(token) for token in settings.get("extra_special_tokens") or []}
    return {
        number: AddedToken(word, normalized=word not in special, special=word in special)
        for word, number in listed.items()
    }


def _token(token: Any, *, special: bool = False) -> Any:
    """A token as files have it, which is a text or an object; anything else is left as it is."""
    if isinstance(token, dict):
        flags = {k: v for k, v in token.items() if k in ("content", "single_word", "lstrip", "rstrip", "normalized")}
        return AddedToken(**flags, special=bool(token.get("special", special))) if "content" in flags else token
    return AddedToken(token, special=special) if isinstance(token, str) else token


def _word(token: Any) -> str | None:
    """The text of a token in whatever form."""
    word = token.get("content") if isinstance(token, dict) else getattr(token, "content", token)
    return word if isinstance(word, str) else None


def _bert(fast: Tokenizer, settings: Mapping[str, Any]) -> None:
    fast.model.unk_token = _word(settings.get("unk_token", "[UNK]"))
    fast.model.continuing_subword_prefix, fast.model.max_input_chars_per_word = "##", 100
    fast.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(prefix="##")


def _around_bert(fast: Tokenizer, settings: Mapping[str, Any]) -> Any:
    cls, sep = (str(_word(settings[name])) for name in ("cls_token", "sep_token"))
    return _template(fast, f"{cls}:0 $A:0 {sep}:0", f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1", (cls, sep))


def _bytes(fast: Tokenizer, settings: Mapping[str, Any]) -> None:
    _pairs(fast)
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings.get("add_prefix_space", False))
    fast.decoder = decoders.ByteLevel()


def _around_roberta(fast: Tokenizer, settings: Mapping[str, Any]) -> Any:
    sep, cls = (str(_word(settings[name])) for name in ("sep_token", "cls_token"))
    numbers: Any = [(word, fast.token_to_id(word)) for word in (sep, cls)]
    trim, blank = settings.get("trim_offsets", True), settings.get("add_prefix_space", False)
    return processors.RobertaProcessing(numbers[0], numbers[1], trim_offsets=trim, add_prefix_space=blank)


def _pieces(fast: Tokenizer, settings: Mapping[str, Any]) -> None:
    scheme = "always" if settings.get("add_prefix_space", True) else "never"
    _metaspace(fast, settings, scheme)


def _t5(fast: Tokenizer, settings: Mapping[str, Any]) -> None:
    _metaspace(fast, settings, "always")


def _metaspace(fast: Tokenizer, settings: Mapping[str, Any], scheme: str) -> None:
    charsmap = settings.get(CHARSMAP)
    if charsmap is not None:
        fast.normalizer = normalizers.Precompiled(charsmap)
    blanks = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme)
    fast.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), blanks])
    fast.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme=scheme)


def _around_pieces(fast: Tokenizer, settings: Mapping[str, Any]) -> Any:
    bos, eos = (str(_word(settings[name])) for name in ("bos_token", "eos_token"))
    return _template(fast, f"{bos} $A {eos}", f"{bos} $A {eos} {eos} $B {eos}", (bos, eos))


def _around_t5(fast: Tokenizer, settings: Mapping[str, Any]) -> Any:
    number = fast.token_to_id(str(_word(settings["eos_token"])))  # under this name, whatever its own
    pair = "$A </s> $B </s>"
    return processors.TemplateProcessing(single="$A </s>", pair=pair, special_tokens=[("</s>", number)])


def _llama(fast: Tokenizer, settings: Mapping[str, Any]) -> None:
    _pairs(fast, fuse=True, fallback=True)
    said = settings.get("add_prefix_space")
    blank = said is None or bool(said)
    scheme = ("always" if settings.get("legacy", False) else "first") if blank else "never"
    fast.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence([*parts, *([decoders.Strip(content=" ", left=1)] if blank else [])])


def _qwen2(fast: Tokenizer, settings: Mapping[str, Any]) -> None:
    _pairs(fast)
    fast.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN2), behavior="isolated", invert=False)
    blank = bool(settings.get("add_prefix_space"))
    raw = pre_tokenizers.ByteLevel(add_prefix_space=blank, use_regex=False)
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Sequence([words, raw]), decoders.ByteLevel()


def _gemma(fast: Tokenizer, settings: Mapping[str, Any]) -> None:
    _pairs(fast, fuse=True, fallback=True, unknown=_word(settings.get("unk_token", "<unk>")))
    fast.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous", invert=False)
    fast.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    fast.normalizer = normalizers.Replace(" ", SPACE)


def _pairs(fast: Tokenizer, *, fuse: bool = False, fallback: bool = False, unknown: str | None = None) -> None:
    """What a class says of byte pairs that are merged."""
    model = fast.model
    model.dropout, model.unk_token, model.ignore_merges = None, unknown, False
    model.fuse_unk, model.byte_fallback = fuse, fallback


def _template(fast: Tokenizer, single: str, pair: str, special: Iterable[str]) -> Any:
    numbered = [(word, fast.token_to_id(word)) for word in dict.fromkeys(special)]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=numbered)


def _of_camembert(settings: Mapping[str, Any]) -> list[str]:
    return ["<s>NOTUSED", "</s>NOTUSED", "<unk>NOTUSED"]


def _of_t5(settings: Mapping[str, Any]) -> list[str]:
    return [f"<extra_id_{number}>" for number in range(settings.get("extra_ids", 100))]


BARE = {
    "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"],
    "special_tokens": {},
}
BY_NAME = "model_specific_special_tokens"
CHARSMAP = "_precompiled_charsmap"  # among the settings: what the vocabulary's file says of characters
ENDS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
PIECES = {**ENDS, "sep_token": "</s>", "cls_token": "<s>", "pad_token": "<pad>", "mask_token": "<mask>"}
OF_BERT = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
OF_T5 = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
END = "<|endoftext|>"
OF_GEMMA = {
    "unk_token": "<unk>",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
OWN = {
    "BertTokenizer": Own("WordPiece", OF_BERT, _bert, _around_bert, types=True),
    "GPT2Tokenizer": Own("BPE", {"unk_token": END, "bos_token": END, "eos_token": END}, _bytes),
    "RobertaTokenizer": Own("BPE", PIECES, _bytes, _around_roberta),
    "XLMRobertaTokenizer": Own("Unigram", PIECES, _pieces, _around_pieces),
    "CamembertTokenizer": Own("Unigram", PIECES, _pieces, _around_pieces, extra=_of_camembert),
    "T5Tokenizer": Own("Unigram", OF_T5, _t5, _around_t5, extra=_of_t5),
    "LlamaTokenizer": Own("BPE", ENDS, _llama),
    "Qwen2Tokenizer": Own("BPE", {"unk_token": END, "eos_token": END, "pad_token": END}, _qwen2),
    "GemmaTokenizer": Own("BPE", OF_GEMMA, _gemma),
}
