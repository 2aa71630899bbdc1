"""Trial rendering of an agent's conversations with the model's chat template, before a run starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from envs.base import Message, Observation, messages_of
from rollout.agents.agent import AgentSettings
from rollout.agents.settings import PartSettings
from rollout.agents.thinking import ThinkSettings
from rollout.chat.chat import Chat

_SAID: Message = {"role": "assistant", "content": "left"}
_NEXT: Message = {"role": "user", "content": "and now?"}
_ASKING = (
    "plan",
    "summary",
    "reflect",
    "library",
)  # parts that add a message of their own after an observation
_RESTARTING = ("window", "summary", "reflect")  # parts that start a new conversation


def try_conversations(chat: Chat, observation: Observation, agent: AgentSettings) -> int:
    """Render the first observation and every form of a later one; returns the number of tokens of the first prompt.

    Covers every role, tool and result that environment and parts may use. ChatError if the template refuses a message
    or leaves it out.
    """
    first = messages_of(observation)
    prompt = chat.opening(first)
    for messages in _later(first, agent.parts):
        chat.delta(messages, ())
    for history in _restarted(first, agent.parts):
        chat.opening(history)
    return len(prompt)


def _later(first: Sequence[Message], parts: Sequence[PartSettings]) -> Iterator[list[Message]]:
    """The messages that may follow a turn in the same conversation."""
    yield [_NEXT]
    for result in _results(first):
        yield [result]
        if any(part.kind in _ASKING for part in parts):
            yield [result, _NEXT]


def _restarted(first: Sequence[Message], parts: Sequence[PartSettings]) -> Iterator[list[Message]]:
    """The messages that may start a new conversation: the task and a history."""
    if any(part.kind in _RESTARTING or (isinstance(part, ThinkSettings) and not part.keep) for part in parts):
        for said in ([_NEXT], *([result] for result in _results(first))):
            yield [*first, _SAID, *said]


def _results(first: Sequence[Message]) -> Iterator[Message]:
    """One result of a tool if there are tools; all results have the same form."""
    for tool in first[0].get("tools", [])[:1]:
        yield {"role": "tool", "name": tool["function"]["name"], "content": "done"}
