"""Conversations: which tokens are the assistant's, in seven families of templates, and how answers end."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import CONVERSATIONS, FAMILIES, QWEN3, TOOL, said, tokenizer_of, write_bytes_tokenizer

from sft_jax.data import chat
from sft_jax.data.answers import encode_passages, encode_prompts
from sft_jax.data.batch import Encoded
from sft_jax.data.chat import Conversation, read_conversation, write_conversation
from sft_jax.data.text import TextTokenizer
from sft_jax.errors import DataError, ModelError

# Family -> kind of conversation -> its documents, supervised parts in brackets; or why there is none.
MASKS = json.loads((Path(__file__).parent / "chat_masks.json").read_text(encoding="utf-8"))


def encoded(
    tokenizer: TextTokenizer, conversations, learned="answers", max_length: int = 10_000, **more: Any
) -> Encoded:
    """The documents of conversations, with what was lost of them."""
    made = chat.passages(tokenizer, conversations, learned, None, **more)
    found = encode_passages(tokenizer, made.passages, max_length, framed=False, rows=made.rows)
    return replace(found, lost={**made.lost, **found.lost}, noted={**made.noted, **found.noted})


def marked(found: Encoded, tokenizer: TextTokenizer, document: int) -> str:
    """The text of a document, what is supervised in brackets."""
    span = slice(found.offsets[document], found.offsets[document + 1])
    learned = np.append(False, found.tokens["token_weight"][span][:-1] > 0)
    text, inside = "", False
    for number, now in zip(found.tokens["input_ids"][span].tolist(), learned.tolist(), strict=True):
        text += ("⟦" if now else "⟧") if now != inside else ""
        text, inside = text + tokenizer.fast.decode([number], skip_special_tokens=False), now
    return text + ("⟧" if inside else "")


def conversation(kind: str) -> Conversation:
    """One of the conversations of the tests."""
    return read_conversation(*CONVERSATIONS[kind])


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_are_those_that_are_written_down(family, kind, tmp_path):
    """C4, C5: of each family and kind of conversation exactly the answers with their ends of turn are supervised."""
    tokenizer = tokenizer_of(family, tmp_path)
    found = encoded(tokenizer, [conversation(kind)])
    assert [marked(found, tokenizer, d) for d in range(len(found))] or list(found.lost) == MASKS[family][kind]
    if len(found):
        assert [marked(found, tokenizer, d) for d in range(len(found))] == MASKS[family][kind]


def test_what_is_written_down_says_enough():
    """C4: the control: no mask is all or nothing, and refusals are among what is written down."""
    documents = [document for kinds in MASKS.values() for found in kinds.values() for document in found]
    masks = [document for document in documents if "⟦" in document]
    assert len(masks) > 30 and not any(mask.startswith("⟦") for mask in masks) and len(documents) - len(masks) == 5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_token_of_each_answer_stops_generation(family, tmp_path):
    """C5: the last supervised id of every turn is among the ids that an export says generation stops at."""
    tokenizer = tokenizer_of(family, tmp_path)
    found = encoded(tokenizer, [conversation(kind) for kind in CONVERSATIONS])
    learned = found.tokens["token_weight"] > 0
    last = found.tokens["label"][learned & ~np.append(learned[1:], False)]
    stops = chat.stop_tokens(tokenizer, found)
    assert len(last) >= 6 and np.isin(last, stops).all()
    assert tokenizer.id("eos_token") in stops and len(stops) <= 3


@pytest.mark.parametrize("family", FAMILIES)
def test_training_and_inference_begin_with_the_same_ids(family, tmp_path):
    """C7: the ids before the first answer are those of the prompt, with one beginning of text where there is one."""
    tokenizer = tokenizer_of(family, tmp_path, puts_begin=True)
    talk = conversation("one turn")
    prompts = encode_prompts(tokenizer, chat.prompts(tokenizer, [talk.prompt], None), 1000, framed=False)
    whole = encoded(tokenizer, [talk]).tokens
    ids = prompts.tokens["input_ids"]
    assert np.array_equal(whole["input_ids"][: len(ids)], ids)
    assert np.flatnonzero(whole["token_weight"])[0] == len(ids) - 1, "the next token is the first of the answer"
    begin = tokenizer.id("bos_token")
    assert begin is None or (ids == begin).sum() == ("bos_token" in FAMILIES[family][0])


def test_a_conversation_becomes_a_document_for_each_view_of_it(tmp_path):
    """C7: where a template drops earlier reasoning, each answer has a document as it is asked for, and they know it."""
    tokenizer = tokenizer_of("qwen3", tmp_path)
    found = encoded(tokenizer, [conversation("one turn"), conversation("thinking"), conversation("tools")])
    assert found.rows.tolist() == [0, 1, 1, 2], "steps with tools between share a document"
    prompts = chat.prompts(tokenizer, [Conversation(CONVERSATIONS["thinking"][0][:3])], None)
    assert marked(found, tokenizer, 2).startswith(prompts[0] + "⟦<think>\nAdd again.")


@pytest.mark.parametrize(
    ("learned", "expected"),
    [
        ("last", "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
                 "<|im_start|>assistant\n⟦d<|im_end|>⟧"),
        ("all", "<|im_start|>⟦user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
                "<|im_start|>assistant\nd<|im_end|>⟧"),
    ],
)  # fmt: skip
def test_what_the_loss_is_on(learned, expected, tmp_path):
    """C4: `last` is the last answer alone, `all` every token but the first, which nothing predicts."""
    tokenizer = tokenizer_of("chatml", tmp_path)
    talk = Conversation([said(("user", "assistant")[n % 2], "abcd"[n]) for n in range(4)])
    assert marked(encoded(tokenizer, [talk], learned), tokenizer, 0) == expected


def test_a_user_who_writes_what_a_template_writes_changes_no_mask(tmp_path):
    """C4: answers are found by place, so that a user who says what an assistant says is not learned from."""
    tokenizer = tokenizer_of("chatml", tmp_path)
    talk = Conversation([said("user", "Hello! assistant\nHello!"), said("assistant", "Hello!")])
    assert marked(encoded(tokenizer, [talk]), tokenizer, 0).count("⟦") == 1
    assert marked(encoded(tokenizer, [talk]), tokenizer, 0).endswith("assistant\n⟦Hello!<|im_end|>⟧")


def test_templates_that_ask_otherwise_than_they_write_are_refused(tmp_path):
    """C7: where the prompt is no beginning of the text with the answer, nothing is learned, and that is counted."""
    forced = QWEN3.replace("assistant\n' }}{% endif %}\n", "assistant\n<think>\n' }}{% endif %}\n")
    assert forced != QWEN3
    tokenizer = write_bytes_tokenizer(tmp_path, forced, special=("<|im_start|>", "<|im_end|>"))
    talk = conversation("one turn")
    assert len(encoded(tokenizer, [talk])) == 1, "an empty thought is written as it is asked for"
    other = replace(tokenizer, template=forced.replace("<think>\n' + (m", "<thought>\n' + (m"))
    found = encoded(other, [talk] * 3)
    assert len(found) == 0 and found.lost == {"the template asks for its answer otherwise than it writes it": 3}


def test_reasons_are_counted_and_not_without_end(tmp_path):
    """C9: conversations that a template refuses are counted by its words, many different words together."""
    template = "{{ raise_exception('no ' ~ messages[0].content) }}"
    tokenizer = write_bytes_tokenizer(tmp_path, template)
    talks = [Conversation([said("user", f"{min(n, 9)}"), said("assistant", "b")]) for n in range(12)]
    found = encoded(tokenizer, talks)
    assert sum(found.lost.values()) == 12 and len(found.lost) == 6
    assert (
        found.lost["refused by the template: no 9"] == 3 and found.lost["refused by the template: other reasons"] == 5
    )
    with pytest.raises(DataError, match=r"conversation 1: the chat template refuses it \(no 0\); change its messages"):
        chat.prompts(tokenizer, talks, None)


def test_no_template_is_one_line(tmp_path):
    """C4: a tokenizer without a template is told so, with the remedy, before anything is learned."""
    tokenizer = write_bytes_tokenizer(tmp_path)
    with pytest.raises(ModelError, match=r"has no chat template; name a file that holds one by task\.template"):
        chat.passages(tokenizer, [conversation("one turn")], "answers", None)
    assert chat.stop_tokens(tokenizer, None) == [tokenizer.id("eos_token")]


def test_rows_are_read_as_they_come():
    """Lists or their JSON, tools too; nulls that a table has put in are left out; the text of it gives it again."""
    plain = read_conversation([said("user", "a"), said("assistant", "b")])
    with_nulls = [{**m, "tool_calls": None, "name": None} for m in plain.messages]
    assert read_conversation(with_nulls) == read_conversation(json.dumps(plain.messages)) == plain
    assert read_conversation("What is AI?").messages == [said("user", "What is AI?")], "a text is what a user says"
    offered = read_conversation(plain.messages, json.dumps([TOOL]))
    assert offered.tools == [TOOL] and read_conversation(plain.messages, "").tools is None
    for talk in (plain, offered, conversation("tools")):
        assert chat.open_conversation(write_conversation(talk)) == talk
    assert plain.prompt.messages == plain.messages[:1] and plain.prompt.answer is None
    assert plain.answer == said("assistant", "b")


@pytest.mark.parametrize(
    ("messages", "tools", "why"),
    [
        (None, None, "expected a list of messages"),
        ([], None, "expected a list of messages"),
        ("[hello", None, "expected a list, or its JSON"),
        ("{}", None, "expected a list of messages"),
        ([{"from": "human", "value": "a"}], None, "message 1 has no role"),
        ([said("user", "a"), {"role": "", "content": "b"}], None, "message 2 has no role"),
        ([said("user", "a"), said("assistant", "")], None, "message 2 is the assistant's and empty"),
        ([said("user", "a")], {"name": "f"}, "expected a list of tools"),
        ([said("user", float("nan"))], None, "expected texts, numbers, lists and objects"),
        ([said("user", {1, 2})], None, "expected texts, numbers, lists and objects"),
    ],
)
def test_rows_that_are_no_conversation_say_what_was_expected(messages, tools, why):
    """C4: what is no conversation is told apart with what was expected."""
    with pytest.raises(ValueError, match=why):
        read_conversation(messages, tools)
