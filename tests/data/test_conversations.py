"""Conversations as rows have them: forms of others, what a message is worth, and what is refused by name."""

import json
import math

import pytest
from chats import CALL, TOOL, said
from datasets import Features, Json, List, Value

from sft_jax.data.chat import Conversation, open_conversation, write_conversation
from sft_jax.data.conversations import (
    as_said,
    content_of,
    is_conversational,
    joined,
    read_answered,
    read_conversation,
    read_segments,
    read_settings,
    read_weight,
)

HI, HELLO = said("user", "Hi"), said("assistant", "Hello")
ASKED = {"name": "w", "arguments": '{"city": "Oslo"}'}


def parts(*texts, **marks):
    """Parts of texts."""
    return [{"type": "text", "text": text, **marks} for text in texts]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], [HI, HELLO]),
        ([{"from": "User", "value": "Hi"}, {"from": "ASSISTANT", "value": "Hello"}], [HI, HELLO]),
        ([{"role": "human", "content": "Hi"}, {"role": "gpt", "content": "Hello"}], [HI, HELLO]),
        ([{"role": "prompter", "text": "Hi"}, {"role": "assistant", "text": "Hello"}], [HI, HELLO]),
        ([{"role": "user", "value": "Hi"}, {"role": "assistant", "value": "Hello"}], [HI, HELLO]),
        (
            [
                {"from": "system", "value": "Be kind."},
                {"from": "human", "value": "Hi"},
                {"from": "function_call", "value": '{"name": "w", "arguments": {"n": 1}}'},
                {"from": "observation", "value": "sunny"},
                {"from": "gpt", "value": "Hello"},
            ],
            [
                said("system", "Be kind."),
                HI,
                {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "w",
                                                                                       "arguments": {"n": 1}}}]},
                said("tool", "sunny"),
                HELLO,
            ],
        ),
        (
            [
                HI,
                {"role": "assistant", "content": None, "function_call": ASKED},
                {"role": "function", "name": "w", "content": "sunny"},
                HELLO,
            ],
            [
                HI,
                {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": ASKED}]},
                {"role": "tool", "content": "sunny", "name": "w"},
                HELLO,
            ],
        ),
        ([HI, {"role": "assistant", "content": None, "refusal": "I can't."}], [HI, said("assistant", "I can't.")]),
        ([HI, {**HELLO, "refusal": None, "tool_calls": None}], [HI, HELLO]),
        ([HI, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}],
         [HI, said("assistant", parts("No."))]),
        ([{"role": "user", "content": [{"type": "text", "value": "Hi"}]},
          {"role": "assistant", "content": [{"type": "reasoning", "value": "Hm."}, {"type": "text", "value": "Yo"}]}],
         [said("user", parts("Hi")), said("assistant", parts("Yo"), reasoning_content="Hm.")]),
        ([HI, {"role": "assistant", "content": [{"type": "tool_call", "value": '{"name": "w", "arguments": {}}'}]}],
         [HI, {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "w", "arguments": {}}}]}]),
        ([said("developer", "Be kind."), HI, said("assistant", "Hello", thinking="Hm.")],
         [said("developer", "Be kind."), HI, said("assistant", "Hello", thinking="Hm.")]),
        ([HI, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
         [HI, {"role": "assistant", "content": None, "tool_calls": [CALL]}]),
    ],
)  # fmt: skip
def test_forms_of_others_are_read_as_messages(messages, expected):
    """F4, F5: ShareGPT's, OpenAI's older and LLaMA-Factory's messages say the same as those that templates know."""
    assert read_conversation(messages) == Conversation(expected)
    assert read_conversation(json.dumps(messages)) == Conversation(expected)


@pytest.mark.parametrize(
    ("marks", "weight"),
    [
        ({"weight": 0}, 0),
        ({"weight": 1}, 1),
        ({"weight": 0.25}, 0.25),
        ({"weight": None}, 1),
        ({"train": False}, 0),
        ({"training": False}, 0),
        ({"train_on_turn": False}, 0),
        ({"trainable": False}, 0),
        ({"loss": False}, 0),
        ({"loss_weight": 0.5}, 0.5),
        ({"loss": 0.5, "weight": 0.5}, 0.25),
        ({"masked": True}, 0),
        ({"train": True, "weight": 0}, 0),
    ],
)
def test_what_an_answer_is_worth_is_its_weight(marks, weight):
    """F4, Q: each key that says what an answer is worth becomes its weight, and is not handed to the template."""
    found = read_conversation([HI, {**HELLO, **marks}, HI, HELLO])
    assert found.messages == [HI, HELLO, HI, HELLO]
    assert found.weights == (None if weight == 1 else [1, weight, 1, 1])
    assert open_conversation(write_conversation(found)) == found


def test_parts_and_places_have_weights():
    """F4: axolotl's `train` of parts, and its `train_detail` by places of the first and last characters."""
    both = [*parts("Let me think.", train=False), *parts(" Four.", train=True)]
    found = read_conversation([HI, said("assistant", both)])
    assert found.messages[1] == said("assistant", parts("Let me think.", " Four."))
    assert found.weights == [1, [["Let me think.", 0], [" Four.", 1]]]
    details = [{"begin_offset": 0, "end_offset": 1, "train": False}, {"begin_offset": 2, "end_offset": 4}]
    found = read_conversation([HI, {**HELLO, "train_detail": details, "weight": 0.5}])
    assert found.messages[1] == HELLO and found.weights == [1, [["He", 0], ["llo", 0.5]]]
    assert read_segments([{"text": "a", "label": True}, {"text": "b", "label": False}]) == [["a", 1], ["b", 0]]
    assert read_conversation([HI, HELLO], weight=0.5).weights == [0.5, 0.5], "the weight of a row is that of all"


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ({**HELLO, "weight": "0"}, "weight of message 2 is '0', expected a number from 0"),
        ({**HELLO, "weight": -1}, "weight of message 2 is -1, expected a number from 0"),
        ({**HELLO, "loss_weight": math.nan}, "loss_weight of message 2 is nan"),
        ({**HELLO, "train": "false"}, "train of message 2 is 'false'"),
        ({**HELLO, "mask": 1}, "message 2 has a 'mask', which means either"),
        (said("assistant", parts("a", weight=[1])), r"weight of a part of message 2 is \[1\]"),
        ({**HELLO, "train_detail": [{"begin_offset": 0, "end_offset": 2}]}, "details that do not cover its text"),
        ({**HELLO, "refusal": "No."}, "message 2 has a content and a refusal"),
        ({"role": "assistant", "function_call": {"arguments": "{}"}}, "message 2 has a call without a name"),
        ({"from": "function_call", "value": "w()"}, r"message 2 is a call that is no JSON: 'w\(\)'"),
        ({"from": "narrator", "value": "a"}, "message 2 is from 'narrator', expected human, gpt, system"),
        (said("assistant", [{"type": "image_url", "image_url": {"url": "x"}}]), "part of type 'image_url', which a mo"),
        (said("assistant", [{"type": "text"}]), "a part of type 'text' without a text"),
        (said("assistant", "", weight=0), "message 2 is the assistant's and empty"),
        ("Hello", "message 2 has no role"),
    ],
)
def test_what_cannot_be_read_of_a_message_is_named(message, why):
    """F4, Q: a mark that cannot be read, and whatever would be lost without a word, names the message and the key."""
    with pytest.raises(ValueError, match=why):
        read_conversation([HI, message])


def test_marks_of_others_than_the_assistant_stay_to_be_counted():
    """F4: `train: false` of a user is as it is; `train: true` asks for more than answers, and stays to be said."""
    found = read_conversation([{**HI, "train": False}, HELLO, {**HI, "train": True}, HELLO])
    assert found == Conversation([HI, HELLO, {**HI, "train": True}, HELLO])


def test_prompts_with_answers_are_conversations():
    """TRL's conversational prompt and completion, either as a text, and alpaca's instruction, input and history."""
    assert read_answered([HI], [HELLO]) == read_answered("Hi", "Hello") == Conversation([HI, HELLO])
    assert read_answered([HI], "Hello") == read_answered("Hi", HELLO) == Conversation([HI, HELLO])
    earlier = read_answered([HI, HELLO, HI], [HELLO])
    assert earlier.weights == [1, 0, 1, 1], "what the assistant says in a prompt is not learned"
    assert read_answered("Hi", None).answer is None
    full = read_answered("Add.", "3", more="1 2", history=[["a", "b"]], system="Be kind.")
    first = [said("system", "Be kind."), said("user", "a"), said("assistant", "b")]
    assert full == Conversation([*first, said("user", "Add.\n1 2"), said("assistant", "3")])
    for text in ('{"a": 1}', "[1, 2]", "[x"):
        assert read_answered(text, text).messages == [said("user", text), said("assistant", text)], "JSON as answers"
    for wrong in ({"prompt": 5, "answer": "a"}, {"prompt": "a", "answer": "b", "history": "x"}):
        with pytest.raises(ValueError, match="expected"):
            read_answered(**wrong)
    with pytest.raises(ValueError, match="beside the column with what the system says"):
        read_conversation([said("system", "a"), HI, HELLO], system="b")


def test_tools_and_settings_are_read():
    """F1, F4: tools as lists or JSON, OpenAI's older functions, and what a row's template is given besides."""
    assert read_conversation([HI, HELLO], functions=True, tools=[{"name": "w"}]).tools == [
        {"type": "function", "function": {"name": "w"}}
    ]
    found = read_conversation([HI, HELLO], json.dumps([TOOL]), settings={"enable_thinking": False})
    assert found.tools == [TOOL] and found.template_kwargs == {"enable_thinking": False}
    assert read_settings('{"a": null}') == {"a": None} and read_settings(None) == {}
    assert [read_weight(value) for value in (None, True, False, 2)] == [1, 1, 0, 2]
    with pytest.raises(ValueError, match="expected an object"):
        read_settings([1])


def test_nulls_of_a_table_are_told_from_those_of_a_row():
    """F2, H: what is null in a table's objects was not said, but for a content; in JSON it was."""
    call = {"name": Value("string"), "arguments": {"city": Value("string"), "n": Value("int64")}}
    kind = Features({"m": List({"role": Value("string"), "content": Value("string"), "calls": List(call)})})["m"]
    row = [{"role": "a", "content": None, "calls": [{"name": "w", "arguments": {"city": None, "n": 1}}]},
           {"role": "b", "content": "c", "calls": None}]  # fmt: skip
    assert as_said(row, kind) == [
        {"role": "a", "content": None, "calls": [{"name": "w", "arguments": {"n": 1}}]},
        {"role": "b", "content": "c"},
    ]
    free = List({"role": Value("string"), "name": Value("string"), "arguments": Json()})
    said_so = [{"role": "a", "name": None, "arguments": {"city": None}}]
    assert as_said(said_so, free) == [{"role": "a", "arguments": {"city": None}}]
    assert as_said(said_so, Json()) == said_so and as_said(None, kind) is None


def test_what_people_are_shown():
    """Contents as texts, parts joined where a template knows none, and what is a conversation at all."""
    assert content_of(HI) == "Hi" and content_of(said("user", parts("a", "b"))) == "ab"
    assert content_of({"role": "assistant", "content": None, "tool_calls": [CALL]}) == json.dumps(CALL)
    talk = Conversation([said("user", parts("a", "b")), said("user", [{"type": "image"}]), HELLO])
    assert [m["content"] for m in joined(talk).messages] == ["ab", [{"type": "image"}], "Hello"]
    assert is_conversational([HI]) and is_conversational(json.dumps([{"from": "human"}])) and is_conversational(HI)
    assert not any(map(is_conversational, ("Hi", "[1]", "[x", None, [], {"a": 1}, 5)))
