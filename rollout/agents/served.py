"""A model behind an OpenAI-compatible server in the place of the policy: it is evaluated, for comparison.

The server renders and samples: there are no tokens of ours, no logprobs and no versions, so nothing of it can be
trained on. What an agent does without tokens is the same: memory, announced tools (a server's tool calls become text in
the style of the environment), pictures, `max_tokens`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import openai

from envs.base import DIRECTIONS, Message, Observation, messages_of
from envs.tools.tool_calls import Style, ToolCall, write_call
from rollout.agents.agent import ContextOverflow, Conversation, SampledTurn
from rollout.chat.chat import ChatError, as_json
from rollout.engines.engine import Completion, EngineFailed, FinishReason, Sampling, derive_seed
from rollout.wire.trajectory import Turn

_OVERFLOW = ("context_length_exceeded", "maximum context length", "context size")
_OPENAI = "api.openai.com"


@dataclass(slots=True)
class ServedConversation(Conversation):
    """What was said so far, as the server is told it."""

    messages: list[Message] = field(default_factory=list)
    called: list[str] = field(default_factory=list)  # ids of tool calls without a result yet


class ServedAgent:
    """An `Actor` that asks a server for every turn.

    client: of the server; it retries and has a time limit. model: its name there. memory: as `agent.memory`.
    """

    def __init__(
        self, client: openai.AsyncOpenAI, model: str, sampling: Sampling, memory: Literal["full", "last"]
    ) -> None:
        self._client = client
        self._model = model
        self._sampling = sampling
        self._memory = memory

    def begin(self, seed: int) -> ServedConversation:
        return ServedConversation(seed)

    def recall(self, conversation: Conversation, turn: Turn) -> None:
        raise NotImplementedError("an evaluation is not resumed")

    async def turn(
        self, conversation: Conversation, observation: Observation
    ) -> SampledTurn | ContextOverflow:
        """Ask for one turn and add it to the conversation. Raises EngineFailed where the server gives no answer."""
        held = cast(ServedConversation, conversation)
        messages = messages_of(observation)
        self._add(held, messages)
        began = time.perf_counter()
        try:
            answer = await self._client.chat.completions.create(**self._request(held, messages[0]))
        except openai.BadRequestError as error:
            if any(mark in str(error) for mark in _OVERFLOW):
                return ContextOverflow(0, 0)
            raise EngineFailed(f"{self._model} refused a request: {error}") from error
        except openai.OpenAIError as error:
            raise EngineFailed(f"{self._model} did not answer: {error}") from error
        seconds = time.perf_counter() - began
        if not answer.choices:
            raise EngineFailed(f"{self._model} sent no choice")
        choice = answer.choices[0]
        action = self._said(held, choice.message)
        held.turn += 1
        completion = _without_tokens("length" if choice.finish_reason == "length" else "stop")
        return SampledTurn(held.segment, as_json(messages), action, (), completion, seconds)

    def _add(self, held: ServedConversation, messages: Sequence[Message]) -> None:
        first = messages[0]
        if first.get("continue_turn"):
            raise ChatError(
                "a served model cannot continue its last turn; leave agent parts away that ask for it"
            )
        if held.messages and (first.get("reset_context") or self._memory == "last"):
            held.messages, held.called = [], []
            held.segment += 1
        if "tools" in first or first.get("reset_context"):
            held.tools = first.get("tools", [])
        for message in messages:
            held.messages.append(_plain(message, held.called))

    def _request(self, held: ServedConversation, first: Message) -> dict[str, Any]:
        sampling = self._sampling
        limit = "max_completion_tokens" if self._client.base_url.host == _OPENAI else "max_tokens"
        request = {
            "model": self._model,
            "messages": held.messages,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": derive_seed(held.seed, held.turn) % 2**31,
            limit: min(sampling.max_tokens, first.get("max_tokens", sampling.max_tokens)),
        }
        tools = [{key: value for key, value in tool.items() if key != "style"} for tool in held.tools]
        return request | ({"tools": tools} if tools else {})

    def _said(self, held: ServedConversation, message: Any) -> str:
        """The action in an answer: its text, and its tool calls as the environment reads them."""
        text = message.content or ""
        calls = [call for call in message.tool_calls or () if call.type == "function"]
        said: Message = {"role": "assistant", "content": text}
        if calls:
            said["tool_calls"] = [call.model_dump(include={"id", "type", "function"}) for call in calls]
        held.messages.append(said)
        held.called = [call.id for call in calls]
        style: Style = "plain" if any(tool.get("style") == "plain" for tool in held.tools) else "hermes"
        return "\n".join(filter(None, [text, *(_written(call.function, style) for call in calls)]))


def _plain(message: Message, called: list[str]) -> Message:
    """A message as servers take it: without directions, pictures as URLs, results with the ids of their calls."""
    told = {key: value for key, value in message.items() if key not in DIRECTIONS}
    if isinstance(told["content"], list):
        told["content"] = [
            {"type": "image_url", "image_url": {"url": part["image"]}}
            if part.get("type") == "image"
            else part
            for part in told["content"]
        ]
    if told["role"] == "tool" and called:
        told["tool_call_id"] = called.pop(0)
    return told


def _written(function: Any, style: Style) -> str:
    """A server's tool call as text. One whose arguments are no JSON object is left as it is, and is malformed."""
    try:
        return write_call(ToolCall(function.name, dict(json.loads(function.arguments or "{}"))), style)
    except (ValueError, TypeError):
        return f"{function.name}({function.arguments})"


def _without_tokens(finish_reason: FinishReason) -> Completion:
    none = np.empty(0, dtype=np.int32)
    return Completion(none, np.empty(0, dtype=np.float32), none, finish_reason)
