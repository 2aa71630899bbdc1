"""OpenAI's chat completions as data: requests are parsed, answers are formatted.

The run's sampling settings apply. Of a request's sampling options, only a lower limit of tokens and `stop`, which
truncates the returned text, are used; others are ignored. Options that change the form of the answer (several choices,
logprobs, audio, the older `functions`), or force a call, are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from envs.base import Message
from envs.tools.tool_calls import THOUGHT, ToolCall, parse_calls
from rollout.chat.template import as_object

# Options that are used, or have no effect; all others are reported as ignored.
_READ = (
    "messages", "model", "n", "tools", "tool_choice", "max_tokens", "max_completion_tokens", "stop", "stream",
    "stream_options", "modalities", "response_format", "metadata", "store", "user", "safety_identifier", "service_tier",
    "prompt_cache_key", "prompt_cache_retention",
)  # fmt: skip
MAX_DEPTH = 64  # of a request's JSON, and of a call's arguments
_ROLES = ("system", "developer", "user", "assistant", "tool")
_KEPT = ("role", "content", "name", "tool_calls", "tool_call_id")  # keys of a message; clients add others
_TEXT_ONLY = "the policy writes text only; remove audio and modalities"
_REFUSED = {
    "logprobs": "log-probabilities are not returned; remove logprobs",
    "top_logprobs": "log-probabilities are not returned; remove top_logprobs",
    "functions": "functions are an older form of tools; use tools",
    "function_call": "functions are an older form of tools; use tools and tool_choice",
    "audio": _TEXT_ONLY,
    "web_search_options": "the policy has no web search; offer one as a tool",
}


class Refused(Exception):
    """A request that gets an error: HTTP status, OpenAI's `code`, and a message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request for one completion."""

    messages: list[Message]  # normalized by `plain`
    tools: list[dict[str, Any]]
    may_call: bool  # whether tool calls are parsed out of the answer
    max_tokens: int | None  # in the answer
    stop: tuple[str, ...]  # the returned text ends before the first of these
    model: str
    stream: bool
    stream_usage: bool
    ignored: tuple[str, ...]  # options without effect


@dataclass(frozen=True, slots=True)
class ChatReply:
    """The policy's answer to a request."""

    message: Message  # the assistant's, in OpenAI's form
    finish_reason: str  # stop, length or tool_calls
    prompt_tokens: int
    completion_tokens: int
    whole: bool = True  # the sampled text was not truncated


def read_json(text: str | bytes | bytearray) -> Any:
    """Parse JSON with at most MAX_DEPTH nested objects and lists. ValueError for anything else."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from None
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inside = [
            each.values() if isinstance(each, dict) else each
            for each in level
            if isinstance(each, dict | list)
        ]
        level = [value for values in inside for value in values]
        if not level:
            return value
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")


def read(body: Any) -> ChatRequest:
    """Parse a request's JSON. Raises Refused with status 400."""
    if not isinstance(body, dict):
        raise _bad("the request must be a JSON object")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _bad("messages must be a list with at least one message")
    if body.get("n") not in (None, 1):
        raise _bad(f"n={body['n']!r}: a request gets one completion; send several requests")
    for name, why in _REFUSED.items():
        if body.get(name):
            raise _bad(why)
    if body.get("modalities") not in (None, [], ["text"]):
        raise _bad(_TEXT_ONLY)
    tools = body.get("tools") or []
    if not isinstance(tools, list) or not all(_is_function(tool) for tool in tools):
        raise _bad(
            "tools must be a list of {type: function, function: {name, ...}}; other types are not supported"
        )
    limits = [body[name] for name in ("max_completion_tokens", "max_tokens") if body.get(name) is not None]
    if not all(isinstance(limit, int) and limit > 0 for limit in limits):
        raise _bad(f"max_tokens and max_completion_tokens must be positive integers; got {limits}")
    choice, form, streamed = (body.get(name) for name in ("tool_choice", "response_format", "stream_options"))
    if choice not in (None, "auto", "none"):
        raise _bad(
            f"tool_choice={choice!r}: the policy cannot be forced to call a tool; use 'auto' or 'none', or remove it"
        )
    ignored = [name for name, value in body.items() if value is not None and name not in (*_READ, *_REFUSED)]
    ignored += ["response_format"] if form not in (None, {"type": "text"}) else []
    return ChatRequest(
        messages=[plain(message) for message in messages],
        tools=tools,
        may_call=bool(tools) and choice != "none",
        max_tokens=min(limits, default=None),
        stop=_stop(body.get("stop")),
        model=str(body.get("model", "")),
        stream=bool(body.get("stream")),
        stream_usage=isinstance(streamed, dict) and bool(streamed.get("include_usage")),
        ignored=tuple(ignored),
    )


def plain(message: Any) -> Message:
    """Normalize a message for chat templates, so that equivalent messages are equal. Raises Refused with status 400.

    Content becomes one text (missing content is empty), JSON arguments of calls become objects, the role developer
    becomes system, and keys without a value or without meaning for templates are removed.
    """
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise _bad("a message must be an object with a role")
    if message["role"] not in _ROLES:
        raise _bad(f"a message's role must be one of {', '.join(_ROLES)}; got {message['role']!r:.80}")
    kept = {key: message[key] for key in _KEPT if message.get(key)}
    if message["role"] == "developer":
        kept["role"] = "system"
    kept["content"] = _text(message.get("content"))
    if calls := kept.get("tool_calls"):
        kept["tool_calls"] = [_call(call) for call in (calls if isinstance(calls, list) else [calls])]
    return kept


def answer(
    asked: ChatRequest, said: str, turn: int, cut: bool, prompt_tokens: int, completion_tokens: int
) -> ChatReply:
    """Format the policy's text as OpenAI's answer to a request. cut: it ended at the limit of tokens.

    Calls become `tool_calls` if the request offers tools and all calls can be parsed; otherwise the agent gets the
    whole text. Calls inside of thoughts are ignored. A `stop` counts as the policy's own end.
    """
    ends = [end for text in asked.stop if (end := said.find(text)) >= 0]
    cut, whole, said = cut and not ends, not ends, said[: min(ends, default=None)]
    thought, closed, spoken = said.rpartition(THOUGHT)
    rest, calls = parse_calls(spoken) if asked.may_call else ("", [])
    readable = [call for call in calls if isinstance(call, ToolCall)]
    message: Message = {"role": "assistant", "content": said}
    if readable and len(readable) == len(calls):
        message["content"] = thought + closed + rest or None
        message["tool_calls"] = [
            {
                "id": f"call_{turn}_{index}",
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
            }
            for index, call in enumerate(readable)
        ]
        return ChatReply(message, "tool_calls", prompt_tokens, completion_tokens, whole)
    return ChatReply(message, "length" if cut else "stop", prompt_tokens, completion_tokens, whole)


def completion(asked: ChatRequest, answered: ChatReply, ident: str, created: int) -> dict[str, Any]:
    """Build a `chat.completion`. created: seconds since 1970."""
    choice = {
        "index": 0,
        "message": answered.message | {"refusal": None},
        "logprobs": None,
        "finish_reason": answered.finish_reason,
    }
    head = {"id": ident, "object": "chat.completion", "created": created, "model": asked.model}
    return head | {"choices": [choice], "usage": _usage(answered)}


def events(asked: ChatRequest, answered: ChatReply, ident: str, created: int) -> Iterator[str]:
    """Build the same as server-sent events: the whole message, then the finish reason, then [DONE]."""
    head = {"id": ident, "object": "chat.completion.chunk", "created": created, "model": asked.model}
    delta = dict(answered.message)
    if "tool_calls" in delta:
        delta["tool_calls"] = [{"index": index} | call for index, call in enumerate(delta["tool_calls"])]
    for said, reason in ((delta, None), ({}, answered.finish_reason)):
        choice = {"index": 0, "delta": said, "logprobs": None, "finish_reason": reason}
        yield f"data: {json.dumps(head | {'choices': [choice]})}\n\n"
    if asked.stream_usage:
        yield f"data: {json.dumps(head | {'choices': [], 'usage': _usage(answered)})}\n\n"
    yield "data: [DONE]\n\n"


def _usage(answered: ChatReply) -> dict[str, int]:
    asked, said = answered.prompt_tokens, answered.completion_tokens
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


def _stop(stop: Any) -> tuple[str, ...]:
    texts = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise _bad("stop must be a non-empty string, or a list of them")
    return tuple(texts)


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    texts = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
    if len(texts) < len(parts):
        raise _bad(
            "a message's content must be text, or parts of the type text; images and audio are not supported"
        )
    return "\n".join(texts)


def _call(call: Any) -> dict[str, Any]:
    match call:
        case {"function": {"name": str(name), **function}} if isinstance(
            written := function.get("arguments"), str | None
        ):
            told = {"name": name, "arguments": as_object(written)}
            return {"id": call.get("id"), "type": "function", "function": told}
    raise _bad(
        "a message's tool_calls must be {id, type: function, function: {name, arguments}}, arguments as text"
    )


def _is_function(tool: Any) -> bool:
    match tool:
        case {"type": "function", "function": {"name": str()}}:
            return True
    return False


def _bad(message: str) -> Refused:
    return Refused(400, "invalid_request", message)
