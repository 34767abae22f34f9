"""Texts with answers in them, in tokens: seams, ends, what is cut, and what is kept in the cache."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from chats import write_bytes_tokenizer
from conftest import write_tokenizer
from tokenizers import AddedToken, Tokenizer, models, processors

from sft_jax.data import answers
from sft_jax.data.answers import Passage, cached, encode_passages, encode_prompts, frame, inside
from sft_jax.data.batch import Shape, collate, lay_out
from sft_jax.data.blocks import Maker
from sft_jax.data.text import load_tokenizer

END = "<|endoftext|>"


def passage(prompt: str, completion: str) -> Passage:
    """A prompt whose completion is to be learned."""
    return Passage(prompt + completion, ((len(prompt), len(prompt + completion)),))


def pieces(found, tokenizer, document: int = 0) -> list[tuple[str, bool]]:
    """The tokens of a document as text, and whether they are supervised."""
    span = slice(found.offsets[document], found.offsets[document + 1])
    learned = np.append(False, found.tokens["token_weight"][span][:-1] > 0).tolist()
    ids = found.tokens["input_ids"][span].tolist()
    return [(tokenizer.fast.decode([i], skip_special_tokens=False), x) for i, x in zip(ids, learned, strict=True)]


@pytest.mark.parametrize("trims", [True, False])
def test_a_token_over_the_seam_belongs_to_the_completion(trims, tmp_path):
    """C8: with a merge of the last letter of the prompt and the first of the completion, that token is supervised."""
    tokenizer = write_bytes_tokenizer(tmp_path, merges=[("c", "d")], trims=trims)
    found = encode_passages(tokenizer, [passage("abc", "de"), passage("ab", "cde")], 99, framed=True)
    assert pieces(found, tokenizer) == [("a", False), ("b", False), ("cd", True), ("e", True), (END, True)]
    assert pieces(found, tokenizer, 1) == pieces(found, tokenizer)
    apart = tokenizer.fast.encode("abc").ids
    assert found.tokens["input_ids"][:3].tolist() != apart, "the prompt's own ids are no beginning: this shows it"


@pytest.mark.parametrize("trims", [True, False])
def test_blanks_are_part_of_what_they_stand_in(trims, tmp_path):
    """C8: tokens of blanks alone, which tokenizers give no place of their own, are supervised in a completion only."""
    tokenizer = write_bytes_tokenizer(tmp_path, merges=[("Ġ", "Ġ"), ("Ġ", "x")], trims=trims)
    found = encode_passages(tokenizer, [passage("a  b", "  \n    x  y")], 99, framed=True)
    shown = pieces(found, tokenizer)
    assert "".join(text for text, learned in shown if not learned) == "a  b"
    assert "".join(text for text, learned in shown if learned) == "  \n    x  y" + END


def test_characters_of_several_tokens_are_whole(tmp_path):
    """C8: every byte of a character belongs where the character does."""
    tokenizer = write_bytes_tokenizer(tmp_path)
    found = encode_passages(tokenizer, [passage("é", "🎉é")], 99, framed=True)
    assert [learned for _, learned in pieces(found, tokenizer)] == [False] * 2 + [True] * 7


def test_the_end_is_a_label_where_padding_is_the_end(tmp_path):
    """C6: with the end of text as padding (GPT-2), the end is a label in every row, and filler is none."""
    tokenizer = write_bytes_tokenizer(tmp_path)
    end = tokenizer.id("eos_token")
    texts = ["ab", "c", f"d{END}e", "fgh" * 5]
    found = encode_passages(tokenizer, [Passage(text, ((0, len(text)),)) for text in texts], 99, framed=True)
    batch = collate(found, lay_out(found, range(4), Shape(4, 24, 1)), Shape(4, 24, 1))
    assert batch["token_weight"].sum(axis=1).tolist() == [2, 1, 3, 15]
    ends = (batch["label"] == end) & (batch["token_weight"] > 0)
    assert ends.sum(axis=1).tolist() == [1, 1, 2, 1], "one that stands in a text is a token like any other"
    assert not batch["token_weight"][batch["segment_ids"] == 0].any()


def test_the_frame_is_the_tokenizers_own(tmp_path):
    """C7: what stands before and after a text is put there once, and the end is added where the tokenizer adds none."""
    write_tokenizer(tmp_path)
    plain = load_tokenizer(tmp_path)
    assert frame(plain) == ((2,), (3,)), "[CLS] and [SEP]"
    assert frame(replace(plain, special={"eos_token": "[SEP]"})) == ((2,), (3,)), "an end that is there is not doubled"
    assert frame(replace(plain, special={"eos_token": "[MASK]"})) == ((2,), (3, 4))
    begin = write_bytes_tokenizer(tmp_path / "b", begin="<s>", puts_begin=True)
    found = encode_passages(begin, [Passage("ab", ((0, 2),))], 99, framed=True)
    assert pieces(found, begin) == [("<s>", False), ("a", True), ("b", True), (END, True)]
    bare = encode_passages(begin, [Passage("<s>ab", ((3, 5),))], 99, framed=False)
    assert pieces(bare, begin) == [("<s>", False), ("a", True), ("b", True)]


FRAMING = {
    "template": processors.TemplateProcessing("<s> $A </s>", "<s> $A $B", [("<s>", 4), ("</s>", 5)]),
    "bert": processors.BertProcessing(("</s>", 5), ("<s>", 4)),
    "roberta": processors.RobertaProcessing(("</s>", 5), ("<s>", 4)),
    "sequence": processors.Sequence([processors.ByteLevel(), processors.BertProcessing(("</s>", 5), ("<s>", 4))]),
}


@pytest.mark.parametrize("kind", FRAMING)
def test_the_frame_needs_no_letter(kind, tmp_path):
    """O: a vocabulary of nucleotides without an unknown token is framed as `transformers` frames it."""
    transformers = pytest.importorskip("transformers")
    fast = Tokenizer(models.BPE({letter: number for number, letter in enumerate("ACGT")}, []))
    fast.add_special_tokens(["<s>", "</s>"])
    fast.post_processor = FRAMING[kind]
    fast.save(str(tmp_path / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    found = encode_passages(ours, [Passage("ACG", ((0, 3),))], 99, framed=True)
    assert found.tokens["input_ids"].tolist() == theirs("ACG")["input_ids"] == [4, 0, 1, 2, 5]
    assert found.tokens["token_weight"].tolist() == [1, 1, 1, 1, 0]
    assert encode_prompts(ours, ["ACG"], 99, framed=True).tokens["input_ids"].tolist() == [4, 0, 1, 2]


@pytest.mark.parametrize("text", ["ab", "<s>ab", f"ab{END}", f"<s>ab{END}"])
def test_ends_that_are_written_out_are_there_once(text, tmp_path):
    """F12: a text that begins or ends with what is put around it gets no second; the end is learned either way."""
    tokenizer = write_bytes_tokenizer(tmp_path, begin="<s>", puts_begin=True)
    found = encode_passages(tokenizer, [passage(text[: text.index("b")], text[text.index("b") :])], 99, framed=True)
    assert pieces(found, tokenizer) == [("<s>", False), ("a", False), ("b", True), (END, True)]
    begun = encode_prompts(tokenizer, [text.removesuffix(END)], 99, framed=True)
    assert tokenizer.fast.decode(begun.tokens["input_ids"].tolist(), skip_special_tokens=False) == "<s>ab"
    twice = encode_passages(tokenizer, [Passage(f"ab{END}{END}", ((0, 2),))], 99, framed=True)
    assert [text for text, _ in pieces(twice, tokenizer)] == ["<s>", "a", "b", END, END], "what is written stays"


def test_blanks_that_a_special_token_swallows_are_no_answer(tmp_path):
    """F13: a header whose token takes the blanks behind it or before it is not learned; the answer's words all are."""
    write_bytes_tokenizer(tmp_path)
    fast = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    marks = [("<|user|>", True, True), ("<|bot|>", False, True), ("<|end|>", False, False)]
    fast.add_special_tokens([AddedToken(mark, lstrip=left, rstrip=right) for mark, left, right in marks])
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    text = "<|user|>\nhi <|bot|>\n  yo  <|user|> hm<|bot|>\nno<|end|>"
    answers = tuple((text.index(words), text.index(words) + len(words)) for words in (" yo  ", "no<|end|>"))
    found = encode_passages(tokenizer, [Passage(text, answers)], 99, framed=False)
    assert "".join(token for token, learned in pieces(found, tokenizer) if learned) == "yono<|end|>"
    assert not found.noted, "the prompt's own tokens are those of the document"


def test_prompts_of_other_tokens_are_counted(tmp_path):
    """F14: answers whose prompt alone is other tokens than the document begins with are counted, and no others."""
    tokenizer = write_bytes_tokenizer(tmp_path, merges=[("c", "d"), ("Ċ", "Ċ")], special=("<|bot|>",))
    given = [passage("abc", "de"), passage("ab", "cde"), passage("x<|bot|>\n", "y"), passage("x<|bot|>\n", "\ny")]
    found = encode_passages(
        tokenizer, [*given, Passage("cd", ((0, 2),)), Passage("cd", ((1, 2),), (), ())], 99, framed=True
    )
    assert found.noted == {answers.SEAM: 2} and len(found) == 6
    prompts = [tokenizer.fast.encode(one.text[: one.answers[0][0]]).ids for one in given]
    ids = found.ids()
    assert sum(ids[n][: len(prompt)] != prompt for n, prompt in enumerate(prompts)) == 2


def test_weights_of_answers_are_those_of_tokens(tmp_path):
    """Q: each token that is to be predicted has the weight of its answer, and what weighs 0 is not learned."""
    tokenizer = write_bytes_tokenizer(tmp_path, merges=[("c", "d")])
    found = encode_passages(
        tokenizer,
        [Passage("abcde", ((1, 3), (3, 5)), (0.5, 2.0)), Passage("abcde", ((1, 3), (3, 5)), (1.0, 0.0))],
        99,
        framed=True,
    )
    assert found.tokens["token_weight"].tolist() == [0.5, 2, 2, 2, 0, 1, 1, 0, 0, 0], "a token over both has the more"
    none = encode_passages(tokenizer, [Passage("ab", ((0, 2),), (0.0,))], 99, framed=True)
    assert len(none) == 0


def test_prompts_begin_as_documents_do(tmp_path):
    """C7: a prompt is the beginning of the document, without the end; one that is too long loses its first tokens."""
    tokenizer = write_bytes_tokenizer(tmp_path, begin="<s>", puts_begin=True)
    prompts = encode_prompts(tokenizer, ["abc", "d"], 99, framed=True)
    whole = encode_passages(tokenizer, [passage("abc", "de"), passage("d", "e")], 99, framed=True)
    for document in range(2):
        given = prompts.tokens["input_ids"][slice(*prompts.offsets[document : document + 2])]
        begin = whole.offsets[document]
        assert np.array_equal(whole.tokens["input_ids"][begin : begin + len(given)], given)
    cut = encode_prompts(tokenizer, ["abcdef"], 3, framed=True)
    assert tokenizer.fast.decode(cut.tokens["input_ids"].tolist()) == "def" and cut.truncated == 1
    assert cut.tokens["token_weight"].tolist() == [1, 1, 0] and cut.tokens["label"][2] == 0


def test_what_is_cut_before_its_answer_is_lost_and_counted(tmp_path):
    """C9: documents are cut on the right; one without a supervised token left is none, and rows say whose is whose."""
    tokenizer = write_bytes_tokenizer(tmp_path)
    given = [passage("a" * 3, "b"), passage("a" * 8, "b"), passage("a" * 7, "bc"), passage("a" * 9, "b")]
    found = encode_passages(tokenizer, given, 8, framed=True, rows=[4, 5, 6, 9])
    assert found.lost == {"cut before its answer": 2} and found.rows.tolist() == [4, 6] and found.truncated == 1
    assert found.lengths.tolist() == [5, 8] and found.tokens["token_weight"].tolist() == [0, 0, 1, 1, 0, *[0] * 6, 1, 0]
    nothing = encode_passages(tokenizer, given[3:], 8, framed=True)
    assert len(nothing) == 0 and nothing.lost == {"cut before its answer": 1}
    assert all(len(values) == 0 for values in nothing.tokens.values())


def test_labels_are_the_tokens_that_follow(tmp_path):
    """C4: each label is the next id of its own document, and the last token of a document predicts nothing."""
    tokenizer = write_bytes_tokenizer(tmp_path)
    found = encode_passages(tokenizer, [passage("ab", "cd"), passage("e", "f")], 99, framed=True)
    ids, label, weight = (found.tokens[name] for name in ("input_ids", "label", "token_weight"))
    last = found.offsets[1:] - 1
    assert not weight[last].any() and not label[last].any()
    inner = np.setdiff1d(np.arange(len(ids)), last)
    assert np.array_equal(label[inner], ids[inner + 1])
    assert (ids.dtype, label.dtype, weight.dtype) == (np.int32, np.int32, np.float32)


def test_places_are_those_of_characters():
    """C8: a token is inside if it holds a character of a span; one that ends where the span begins is not."""
    offsets = [(0, 0), (0, 2), (2, 3), (3, 3), (5, 7), (7, 9), (0, 0)]
    assert inside(offsets, [(2, 5)]).tolist() == [False, False, True, True, True, False, False]
    assert not inside(offsets, []).any() and inside([], [(0, 9)]).tolist() == []


def test_the_cache_is_found_by_all_that_tokens_depend_on(tmp_path, monkeypatch):
    """C22: the same again is found, with what was lost; another template, end, text, length or version is made anew."""
    rows = ["a", "a" * 9], ["bc", "b"]
    tokenizer = replace(write_bytes_tokenizer(tmp_path / "t", "one"), home=tmp_path / "cache")
    made = []

    def ask(tokenizer, *origin: str):
        def make(texts, targets):
            made.append(origin)
            return encode_passages(tokenizer, list(map(passage, texts, targets)), 8, framed=True)

        return cached(tokenizer, origin, rows, lambda: Maker(make))

    first, again = ask(tokenizer, "x"), ask(tokenizer, "x")
    assert len(made) == 1 and again.lost == first.lost == {"cut before its answer": 1} and again.rows.tolist() == [0]
    assert again.truncated == first.truncated and np.array_equal(again.offsets, first.offsets)
    assert all(np.array_equal(again.tokens[name], values) for name, values in first.tokens.items())
    for other in (replace(tokenizer, template="two"), replace(tokenizer, special={"eos_token": "a"})):
        ask(other, "x")
    ask(tokenizer, "y")
    monkeypatch.setattr(answers, "VERSION", "another")
    ask(tokenizer, "x")
    assert len(made) == 5
    ask(replace(tokenizer, home=None), "x")
    assert len(made) == 6 and len(list(Path(tmp_path / "cache").iterdir())) == 5
