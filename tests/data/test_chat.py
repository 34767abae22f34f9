"""Conversations: which tokens are the assistant's, in seven families of templates, and how answers end."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import (
    CHATML,
    CLOSED,
    CONVERSATIONS,
    FAMILIES,
    FORCED,
    HANGING,
    HARMONY,
    METHARME,
    MOVED,
    TOOL,
    said,
    tokenizer_of,
    write_bytes_tokenizer,
)

from sft_jax.data import chat, turns
from sft_jax.data.answers import encode_passages, encode_prompts, with_lost
from sft_jax.data.batch import Encoded
from sft_jax.data.chat import Conversation, write_conversation
from sft_jax.data.conversations import read_conversation
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
    return replace(with_lost(found, made.lost), noted={**made.noted, **found.noted})


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
        (
            "last",
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
            "<|im_start|>assistant\n⟦d<|im_end|>⟧",
        ),
        (
            "all",
            "<|im_start|>⟦user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
            "<|im_start|>assistant\nd<|im_end|>⟧",
        ),
    ],
)
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


IM = ("<|im_start|>", "<|im_end|>")
TURNS = [said("user", "Hi"), said("assistant", "Hello!"), said("user", "Bye"), said("assistant", "So long.")]


@pytest.mark.parametrize(
    ("template", "tokens", "expected"),
    [
        (
            FORCED,
            ("<|endoftext|>", *IM),
            [
                "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n⟦Hello!<|im_end|>⟧",
                "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
                "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n<think>\n⟦So long.<|im_end|>⟧",
            ],
        ),
        (
            CLOSED,
            ("<|endoftext|>", *IM),
            [
                "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n⟦</think>Hello!<|im_end|>⟧",
                "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think></think>Hello!<|im_end|>\n"
                "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n<think>\n⟦</think>So long.<|im_end|>⟧",
            ],
        ),
    ],
)
def test_answers_asked_for_otherwise_are_trained_as_they_are_asked_for(template, tokens, expected, tmp_path):
    """C7: where the prompt is no beginning of the text, a document is the prompt and the answer behind its header."""
    tokenizer = write_bytes_tokenizer(tmp_path, template, None, *[tokens[0], tokens[1:]])
    found = encoded(tokenizer, [Conversation(TURNS)])
    assert [marked(found, tokenizer, d) for d in range(2)] == expected and not found.lost
    assert found.noted == {turns.ASKED: 2}
    prompts = chat.prompts(tokenizer, [Conversation(TURNS[:3])], None)
    assert expected[1].startswith(prompts[0] + "⟦"), "exactly what generation begins with"


def test_a_system_message_that_moves_stands_where_generation_meets_it(tmp_path):
    """C7: a system message that a template puts into the last turn of the user's alone is before each answer."""
    tokenizer = write_bytes_tokenizer(tmp_path, MOVED, "<s>", "</s>")
    found = encoded(tokenizer, [Conversation([said("system", "Be kind."), *TURNS])])
    assert [marked(found, tokenizer, d) for d in range(len(found))] == [
        "<s>[INST] Be kind.\n\nHi[/INST]⟦ Hello!</s>⟧",
        "<s>[INST] Hi[/INST] Hello!</s>[INST] Be kind.\n\nBye[/INST]⟦ So long.</s>⟧",
    ]
    whole = encoded(tokenizer, [Conversation([said("system", "Be kind."), *TURNS])], "all")
    assert marked(whole, tokenizer, 0) == "<s>⟦[INST] Hi[/INST] Hello!</s>[INST] Bye[/INST] So long.</s>⟧"
    assert not whole.noted and len(whole) == 1, "F15: all of a text needs no seam"


def test_where_nothing_of_the_header_asks_there_is_no_seam(tmp_path):
    """C7: an answer behind a header of which the prompt has nothing is lost by name, never learned with the header."""
    other = "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
    other += "{% if add_generation_prompt %}{{ '[answer]' }}{% endif %}"
    tokenizer = write_bytes_tokenizer(tmp_path, other)
    assert encoded(tokenizer, [Conversation(TURNS)] * 3).lost == {turns.OTHERWISE: 3}
    assert len(encoded(tokenizer, [Conversation(TURNS)], "all")) == 1


SPECIAL = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>")
HANGS = ("<|turn|>", "<|bot|>", "<|user|>", "<|say|>", "<|said|>", "<|over|>")


def test_an_answer_ends_as_the_template_ends_it(tmp_path):
    """F8, F9, F11: what ends a conversation where nothing else does is learned, the next turn's header is not, and
    stops are what the rows' own answers end with."""
    harmony = write_bytes_tokenizer(tmp_path / "a", HARMONY, None, "<|return|>", SPECIAL)
    found = encoded(harmony, [Conversation(TURNS)])
    assert [marked(found, harmony, d) for d in range(2)] == [
        "<|start|>user<|message|>Hi<|end|><|start|>assistant⟦<|channel|>final<|message|>Hello!<|return|>⟧",
        "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>Hello!<|end|>"
        "<|start|>user<|message|>Bye<|end|><|start|>assistant⟦<|channel|>final<|message|>So long.<|return|>⟧",
    ]
    assert stops(harmony, found) == ["<|return|>"], "an answer never ends with the end of a thought"
    calls = encoded(harmony, [conversation("tools"), conversation("thinking")])
    assert stops(harmony, calls) == ["<|call|>", "<|return|>"]
    metharme = write_bytes_tokenizer(tmp_path / "b", METHARME, None, "</s>", ("<|user|>", "<|assistant|>"))
    found = encoded(metharme, [Conversation(TURNS)])
    assert [marked(found, metharme, d) for d in range(2)] == [
        "<|user|>Hi<|assistant|>⟦Hello!</s>⟧",
        "<|user|>Hi<|assistant|>Hello!<|user|>Bye<|assistant|>⟦So long.</s>⟧",
    ]
    hanging = write_bytes_tokenizer(tmp_path / "c", HANGING, "<s>", "<|over|>", HANGS)
    found = encoded(hanging, [Conversation(TURNS)])
    assert marked(found, hanging, 0) == (
        "<s><|turn|><|user|>Hi<|over|><|turn|><|bot|><|say|>⟦Hello!<|said|><|over|>⟧<|turn|><|user|>Bye<|over|>"
        "<|turn|><|bot|><|say|>⟦So long.<|said|><|over|>⟧"
    )
    assert stops(hanging, found) == ["<|over|>"]


def test_a_header_in_words_that_hangs_on_is_not_learned(tmp_path):
    """F8: nor is the next turn's header where it is words, which every text ends with."""
    for end, learned in (("</s>\n", "Hello!</s>"), ("", "Hello!")):
        words = (
            "{% for m in messages %}{{ m.role + ': ' + m.content + '" + end.replace("\n", "\\n") + "' }}{% endfor %}"
        )
        tokenizer = write_bytes_tokenizer(tmp_path / str(len(end)), words + "assistant:", None, "</s>")
        found = encoded(tokenizer, [Conversation(TURNS[:2])])
        assert marked(found, tokenizer, 0).endswith(f"assistant:⟦ {learned}⟧")
        assert marked(encoded(tokenizer, [Conversation(TURNS[:2])], "all"), tokenizer, 0).endswith(f" {learned}⟧")


def stops(tokenizer: TextTokenizer, found: Encoded | None) -> list[str]:
    """The tokens that generation stops at, sorted."""
    return sorted(tokenizer.fast.id_to_token(number) for number in chat.stop_tokens(tokenizer, found))


def test_without_training_documents_stops_are_those_of_the_models_files(tmp_path):
    """C5: a model that was exported stops at what its generation_config.json says, and at the end of text."""
    tokenizer = replace(tokenizer_of("llama3", tmp_path), answers={"eos_token_id": [256, 261]})
    assert chat.stop_tokens(tokenizer, None) == [256, tokenizer.id("eos_token"), 261]
    cut = encoded(tokenizer, [conversation("one turn")], "all", max_length=5)
    assert cut.truncated == 1 and chat.stop_tokens(tokenizer, cut) == [tokenizer.id("eos_token")], "cut is no end"


def test_a_probe_of_ours_stops_no_run(tmp_path):
    """F11: what a template does with tools alone matters to no conversation without them, and costs those with them."""
    unsafe = CHATML.replace("{%- for call", "{%- if m.tool_calls %}{{ messages.append(1) }}{% endif %}{%- for call")
    tokenizer = write_bytes_tokenizer(tmp_path, unsafe, special=IM)
    found = encoded(tokenizer, [conversation("one turn"), conversation("tools"), conversation("three turns")])
    assert len(found) == 2 and found.rows.tolist() == [0, 2]
    ((why, count),) = found.lost.items()
    assert count == 1 and "'append' of 'list' object is unsafe" in why


NOTHINGS = {
    "a call of another kind": {"content": None, "function_call": {"name": "f", "arguments": "{}"}},
    "another key": {"value": "Hello!"},
    "a refusal": {"content": None, "refusal": "No."},
    "empty": {"content": ""},
    "a thought that is taken out": {"content": "<think>\nWell.\n</think>\n"},
}


@pytest.mark.parametrize("family", ["qwen3", "chatml"])
@pytest.mark.parametrize("kind", NOTHINGS)
def test_an_answer_of_which_nothing_is_written_is_lost(kind, family, tmp_path):
    """F5: what stands in the place of words that a template does not write is its own, and is never learned."""
    template, *tokens = FAMILIES[family]
    template = template.replace("m.content or ''", "(m.content or '').split('</think>\\n')[-1]")
    tokenizer = write_bytes_tokenizer(tmp_path, template, *tokens)
    silent = {"role": "assistant", **NOTHINGS[kind]}
    found = encoded(tokenizer, [Conversation([said("user", "Hi"), silent]), conversation("one turn")])
    assert found.lost == {turns.NOTHING: 1} and found.rows.tolist() == [1]
    inner = encoded(tokenizer, [Conversation([said("user", "Hi"), silent, *TURNS])])
    assert inner.lost == {turns.NOTHING: 1}
    spared = Conversation([said("user", "Hi"), silent, *TURNS], weights=[1, 0, 1, 1, 1, 1])
    assert not encoded(tokenizer, [spared]).lost, "what is not to be learned may be nothing"


def test_fields_that_are_not_written_are_said(tmp_path):
    """F5: of an answer in several fields, calls that are not written lose it, and other fields are counted."""
    tokenizer = write_bytes_tokenizer(tmp_path, CHATML.replace("m.tool_calls", "m.nothing"), special=IM)
    both = [said("user", "Hi"), said("assistant", "I look.", tool_calls=CONVERSATIONS["tools"][0][1]["tool_calls"])]
    thinks = [said("user", "Hi"), said("assistant", "Hello!", reasoning_content="Well.")]
    found = encoded(tokenizer, [Conversation(both), Conversation(thinks), Conversation(TURNS[:2], [TOOL])])
    assert found.lost == {"the template does not write tool_calls of its answer": 1}
    assert found.noted == {"answers whose reasoning the template does not write": 1}
    silent = write_bytes_tokenizer(tmp_path / "b", CHATML.replace("and tools", "and nothing"), special=IM)
    assert encoded(silent, [Conversation(TURNS, [TOOL])]).noted == {turns.TOOLLESS: 1}


THINKING = """\
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}
"""


def test_settings_reach_the_template_and_those_that_change_nothing_are_said(tmp_path):
    """What rows and the configuration give a template changes its text as in `transformers`, in prompts too."""
    transformers = pytest.importorskip("transformers")
    tokenizer = write_bytes_tokenizer(tmp_path, THINKING, special=IM)
    settings = {"enable_thinking": False, "effort": "low"}
    talk = Conversation(TURNS, template_kwargs=settings)
    found = encoded(tokenizer, [talk, Conversation(TURNS)])
    empty = "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Hello!<|im_end|>⟧"
    assert marked(found, tokenizer, 0).endswith(empty) and "think" not in marked(found, tokenizer, 2)
    assert found.noted == {
        turns.ASKED: 2,
        "conversations of which effort of chat_template_kwargs changes no text": 1,
    }
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    expected = theirs.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True, **settings)
    assert chat.prompts(tokenizer, [talk._replace(messages=TURNS[:1])], None) == [expected]
    with pytest.raises(
        DataError, match="chat_template_kwargs: tools is what the conversation itself says; leave it out"
    ):
        chat.prompts(tokenizer, [Conversation(TURNS[:1], template_kwargs={"tools": []})], None)


def weighed(tokenizer: TextTokenizer, *talks: Conversation, **more: Any) -> list[list[tuple[str, float]]]:
    """Of each document the pieces of equal weight."""
    found = encoded(tokenizer, talks, **more)
    documents = []
    for first, last in zip(found.offsets[:-1], found.offsets[1:], strict=True):
        weights = np.append(0, found.tokens["token_weight"][first:last][:-1])
        begins = [0, *(np.flatnonzero(np.diff(weights)) + 1), len(weights)]
        ids = found.tokens["input_ids"][first:last]
        documents.append([
            (tokenizer.fast.decode(ids[a:b].tolist(), skip_special_tokens=False), round(float(weights[a]), 3))
            for a, b in itertools.pairwise(begins)
        ])  # fmt: skip
    return documents


def test_weights_scale_answers_and_parts_of_them(tmp_path):
    """F4, Q: what weighs 0 is context alone, other numbers scale, parts are found in order, and what is not is lost."""
    tokenizer = tokenizer_of("chatml", tmp_path)
    (document,) = weighed(tokenizer, Conversation(TURNS, weights=[1, 0, 0, 0.5]))
    assert [pair for pair in document if pair[1]] == [("So long.<|im_end|>", 0.5)]
    parts = [said("user", "Hi"), said("assistant", "Wrong. Right. Wrong.")]
    (document,) = weighed(tokenizer, Conversation(parts, weights=[1, [["Wrong.", 0], [" Right.", 2], ["Wrong.", 0]]]))
    assert document[1:] == [("Right. ", 2.0), ("Wrong.<|im_end|>", 0.0)]
    missing = Conversation(parts, weights=[1, [["Right.", 1], ["Right.", 0]]])
    zero = Conversation(TURNS, weights=[1, 0, 1, [["So", 0]]])
    found = encoded(tokenizer, [missing, zero, Conversation(TURNS[:2], weights=[0, 1])])
    assert found.lost == {turns.UNFOUND: 1, turns.WEIGHTLESS: 1} and found.rows.tolist() == [2]


def test_weights_and_masks_hold_where_all_is_learned(tmp_path):
    """Q: with the loss on all, answers keep their weights, and reasoning that is masked is not learned either."""
    tokenizer = tokenizer_of("chatml", tmp_path)
    (document,) = weighed(tokenizer, Conversation(TURNS, weights=[1, 0, 1, 0.5]), learned="all")
    assert document[1:] == [
        ("user\nHi<|im_end|>\n<|im_start|>assistant\n", 1.0),
        ("Hello!<|im_end|>", 0.0),
        ("\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n", 1.0),
        ("So long.<|im_end|>", 0.5),
    ]
    within = Conversation([said("user", "Hi"), said("assistant", "<think>Well.</think>Hello!")])
    (document,) = weighed(tokenizer, within, learned="all", masked=["reasoning"])
    assert document[2:] == [("Well.", 0.0), ("</think>Hello!<|im_end|>", 1.0)]
    anew = encoded(tokenizer_of("qwen3", tmp_path / "q"), [Conversation(TURNS, weights=[1, 0, 1, 1])] * 2, "all")
    assert anew.lost == {turns.SEVERAL: 2}


def test_reasoning_and_what_the_template_puts_before_answers_may_be_left_out(tmp_path):
    """`task.mask`: places of reasoning, in a field or within the words, and an empty thought are not learned."""
    tokenizer = tokenizer_of("qwen3", tmp_path)
    thinks = [said("user", "Hi"), said("assistant", "Hello!", reasoning_content="Well.")]
    (document,) = weighed(tokenizer, Conversation(thinks), masked=["reasoning"])
    assert document[1:] == [("<think>\n", 1.0), ("Well.", 0.0), ("\n</think>\n\nHello!<|im_end|>", 1.0)]
    within = [said("user", "Hi"), said("assistant", "<think>Well.</think>Hello!")]
    (document,) = weighed(tokenizer, Conversation(within), masked=["reasoning"])
    assert document[2] == ("Well.", 0.0) and document[3] == ("</think>Hello!<|im_end|>", 1.0)
    (document,) = weighed(tokenizer, Conversation(TURNS[:2]), masked=["scaffold"])
    assert document[0][0].endswith("assistant\n<think>\n\n</think>\n\n") and document[1:] == [("Hello!<|im_end|>", 1.0)]
    call = CONVERSATIONS["tools"][0][:2]
    (document,) = weighed(tokenizer, Conversation(call, [TOOL]), masked=["scaffold"])
    assert document[1][0].startswith("<tool_call>"), "what a call is written in is its own"


def test_long_conversations_are_rendered(tmp_path):
    """F10: hundreds of turns are one document where the template allows, and one too long for it costs a row."""
    tokenizer = tokenizer_of("chatml", tmp_path)
    talk = Conversation([m for n in range(120) for m in (said("user", f"u{n}"), said("assistant", f"a{n}"))])
    made = chat.passages(tokenizer, [talk], "answers", None)
    assert len(made.passages) == 1 and len(made.passages[0].answers) == 120
    slow = CHATML + "{% if messages[0].content == 'slow' %}{% for a in range(99999) %}{% for b in range(99999) %}"
    slow += "{% endfor %}{% endfor %}{% endif %}"
    found = encoded(
        replace(tokenizer, template=slow), [Conversation(TURNS), Conversation([said("user", "slow"), *TURNS])] * 1
    )
    assert found.rows.tolist() == [0] and list(found.lost.values()) == [1]
    assert "takes it more than 2 s" in next(iter(found.lost))


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
        ([{"value": "a"}], None, "message 1 has no role"),
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
