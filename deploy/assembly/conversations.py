"""The conversations an agent will have, tried on the model's chat template before anything is started."""

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
)  # parts that say something of their own behind an observation
_FORGETTING = ("window", "summary", "reflect")  # parts with which a conversation begins anew


def rehearse(chat: Chat, observation: Observation, agent: AgentSettings) -> int:
    """Render the first observation and every form of a later one; returns the tokens of the first prompt.

    Every role, tool and result is tried that environment and parts are known to say. Raises ChatError where the
    template refuses one, or leaves it out.
    """
    first = messages_of(observation)
    prompt = chat.opening(first)
    for messages in _later(first, agent.parts):
        chat.delta(messages, ())
    for history in _begun_anew(first, agent.parts):
        chat.opening(history)
    return len(prompt)


def _later(first: Sequence[Message], parts: Sequence[PartSettings]) -> Iterator[list[Message]]:
    """What may be said to a turn where the conversation goes on."""
    yield [_NEXT]
    for result in _results(first):
        yield [result]
        if any(part.kind in _ASKING for part in parts):
            yield [result, _NEXT]


def _begun_anew(first: Sequence[Message], parts: Sequence[PartSettings]) -> Iterator[list[Message]]:
    """What a conversation may begin anew with: the task and a history."""
    if any(part.kind in _FORGETTING or (isinstance(part, ThinkSettings) and not part.keep) for part in parts):
        for said in ([_NEXT], *([result] for result in _results(first))):
            yield [*first, _SAID, *said]


def _results(first: Sequence[Message]) -> Iterator[Message]:
    """One result of a tool, where tools are offered: they are of one form."""
    for tool in first[0].get("tools", [])[:1]:
        yield {"role": "tool", "name": tool["function"]["name"], "content": "done"}
