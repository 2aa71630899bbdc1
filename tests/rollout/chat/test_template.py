"""A chat template is foreign code: whatever it does is a ChatError, and what it leaves out is refused."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from transformers import AutoTokenizer

from envs.base import Message
from learner.model.tokenizer import CHAT_TEMPLATE
from rollout.chat.chat import Chat, ChatError
from rollout.chat.tool_prompt import tools_text
from rollout.external.openai_format import plain
from tests.rollout.chat.test_chat import CHATML, TOKENIZERS, TOOLS, bpe
from tests.smollm2 import FOLDER, needs_smollm2

END = TOKENIZERS["chatml"].convert_tokens_to_ids("<|im_end|>")
LOOKUP = {"type": "function", "function": {"name": "lookup", "description": "finds", "parameters": {}}}
ITEMS = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}{% for c in m.tool_calls or [] %}"
    "<function={{ c.function.name }}>{% for k, v in c.function.arguments|items %}{{ k }}={{ v }};{% endfor %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def called(arguments: Any, content: Any = None) -> list[Message]:
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": arguments}}
    said: Message = {"role": "assistant", "content": content, "tool_calls": [call]}
    return [{"role": "user", "content": "hi"}, said, {"role": "tool", "content": "noon"}]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"city": "Paris"}, "city=Paris;"),
        ('{"city": "Paris"}', "city=Paris;"),
        *[(none, "") for none in ({}, "{}", "", " ", None, "null")],
    ],
)
def test_arguments_are_an_object_however_they_are_written(arguments: Any, said: str) -> None:
    chat, tokenizer = Chat(bpe(ITEMS)), bpe(ITEMS)
    messages = called(arguments)
    expected = (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<function=now>" + said + "<|im_end|>\n"
        "<|im_start|>tool\nnoon<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(chat.opening(messages)) == expected
    if not isinstance(arguments, dict):  # as a client sends them
        assert tokenizer.decode(chat.opening([plain(message) for message in messages])) == expected


@pytest.mark.parametrize("arguments", ["not json", "[1]", "5", [1]])
def test_arguments_that_are_no_object_are_refused_where_the_template_wants_one(arguments: Any) -> None:
    with pytest.raises(ChatError, match=r"\['user', 'assistant', 'tool'\]: TypeError"):
        Chat(bpe(ITEMS)).opening(called(arguments))


TRICKS = {
    "divides": "{{ 1 / 0 }}",
    "asks for what is not there": "{{ messages[0].nothing.more }}",
    "calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "adds text to a number": "{{ 'a' + 1 }}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "doubles": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "writes much": "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "reaches out": "{{ messages.__class__.__mro__ }}",
    "does not compile": "{% if %}",
}


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("where", ["user", "tool"])
def test_whatever_a_template_does_is_refused_in_one_line(trick: str, where: str) -> None:
    """At once where it is done for every message, else with the message that brings it about."""
    template = "{% for m in messages %}{% if m.role == 'ROLE' %}TRICK{% endif %}{% endfor %}" + CHATML
    tokenizer = bpe(template.replace("ROLE", where).replace("TRICK", TRICKS[trick]))
    with pytest.raises(ChatError, match="chat template of this tokenizer") as refused:
        Chat(tokenizer).opening([{"role": "tool", "content": "done"}])
    assert str(refused.value).count("\n") == 0
    assert sys.gettrace() is None


def test_a_long_history_is_no_endless_one() -> None:
    history: list[Message] = [{"role": role, "content": "go left"} for role in ("user", "assistant")] * 2000
    assert len(Chat(bpe(CHATML)).opening(history)) > 4000


def known(*roles: str) -> str:
    cases = "".join(
        "{% if m.role == '" + role + "' %}<|im_start|>" + role + "\n{{ m.content }}<|im_end|>\n{% endif %}"
        for role in roles
    )
    return (
        "{% for m in messages %}"
        + cases
        + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


# A system message is read where it comes first, and there alone.
SYSTEM_FIRST = (
    "{% if messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    + known("user", "assistant")
)


@pytest.mark.parametrize(
    ("template", "messages", "left_out"),
    [
        (known("user", "assistant"), [{"role": "tool", "content": "9"}], "of the role 'tool' says"),
        (known("user", "assistant"), [{"role": "system", "content": "s"}], "of the role 'system' says"),
        (
            SYSTEM_FIRST,
            [{"role": "user", "content": "s"}, {"role": "system", "content": "s"}],
            "role 'system'",
        ),
        (
            known("user", "assistant"),
            [{"role": "user", "content": "q", "tools": [LOOKUP]}],
            r"a tool that is offered \(lookup\).*chat_template\.jinja",
        ),
        (CHATML, called({}, "I ask"), "the name of a call"),
        (ITEMS.replace("{{ k }}={{ v }};", ""), called({"city": "user"}), "the arguments of a call"),
    ],
)
def test_what_a_template_leaves_out_is_refused(template: str, messages: list[Message], left_out: str) -> None:
    """Also where its words stand in the prompt for another reason: the answer "9", a value that is called "user"."""
    with pytest.raises(ChatError, match=left_out):
        Chat(bpe(template)).opening(messages)


def test_a_later_message_is_refused_where_the_template_leaves_it_out() -> None:
    chat = Chat(bpe(SYSTEM_FIRST))
    chat.opening([{"role": "system", "content": "be brief"}, {"role": "user", "content": "go"}])
    with pytest.raises(ChatError, match="leaves out what a message of the role 'system' says"):
        chat.delta([{"role": "system", "content": "a reminder"}, {"role": "user", "content": "go"}], [END])
    with pytest.raises(ChatError, match="leaves out what a message of the role 'tool' says"):
        chat.delta([{"role": "tool", "content": "the result"}], [END])


def test_what_is_said_in_other_letters_is_said() -> None:
    for filtered in (
        "m.content | trim",
        "m.content | tojson",
        "m.content | upper if m.role == 'tool' else m.content",
    ):
        chat = Chat(bpe(TOOLS + CHATML.replace("m.content", filtered)))
        chat.opening(
            [{"role": "user", "content": " q ", "tools": [LOOKUP]}, {"role": "tool", "content": 'a\n"b"'}]
        )
        chat.opening([{"role": "user", "content": ""}])  # there is nothing to be left out
    Chat(bpe(CHAT_TEMPLATE)).opening(
        [{"role": "user", "content": "q", "tools": [LOOKUP | {"style": "plain"}]}]
    )


@needs_smollm2
def test_the_real_smollm2_reads_tools_in_its_system_message_and_their_results() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    chat = Chat(tokenizer)
    asked = {"role": "user", "content": "question"}
    told = {"role": "system", "content": tools_text([LOOKUP])}
    for messages in ([told, asked], [{**told, "content": "Be brief.\n\n" + told["content"]}, asked]):
        announced = [{**asked, "tools": [LOOKUP]}]
        if messages[0] != told:
            announced = [{"role": "system", "content": "Be brief.", "tools": [LOOKUP]}, asked]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(chat.opening(announced)) == rendered
    result = chat.delta([{"role": "tool", "name": "lookup", "content": "42"}], [tokenizer.eos_token_id])
    assert tokenizer.decode(result) == "\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n"


@needs_smollm2
def test_a_template_with_a_section_for_tools_says_them_there() -> None:
    each = "{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    section = "{% if tools %}<|im_start|>system\n" + each + "<|im_end|>\n{% endif %}"
    offering = AutoTokenizer.from_pretrained(FOLDER)
    offering.chat_template = section + offering.chat_template
    offered = Chat(offering).opening([{"role": "user", "content": "question", "tools": [LOOKUP]}])
    said = offering.decode(offered)
    assert '"name": "lookup"' in said and "You may call these tools" not in said
