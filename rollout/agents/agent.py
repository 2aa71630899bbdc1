"""One turn of an agent: observation to prompt, prompt to sampled tokens, tokens to action."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from envs.base import Message, Observation
from rollout.agents.clock import BusyClock
from rollout.agents.settings import PartSettings, check_together
from rollout.chat.chat import Chat, ChatError, TooLong, as_json
from rollout.chat.long_text import off_loop
from rollout.chat.perception import PerceptionError
from rollout.engines.engine import Completion, Generates, Sampling, derive_seed
from rollout.wire.images import MAX_EPISODE_BYTES, images_in
from rollout.wire.trajectory import Step


@dataclass(slots=True)
class Conversation:
    """What one episode has said so far; an agent is shared by many."""

    seed: int  # every turn samples with a seed derived from it
    ids: list[int] = field(default_factory=list)  # all tokens of the current segment
    segment: int = 0
    turn: int = 0
    sampled: list[int] = field(default_factory=list)  # the last turn's action
    tools: list[dict[str, Any]] = field(default_factory=list)  # what was said last of what can be called
    images: list[str] = field(default_factory=list)  # the pictures of the current segment, as data URLs
    shown_bytes: int = 0  # of all pictures so far

    def open_segment(self) -> None:
        """Forget: what follows has no history. What was said stays stored as it is."""
        self.segment += 1
        self.ids = []
        self.sampled = []
        self.images = []

    def show(self, images: Sequence[str]) -> None:
        """Pictures are added to the segment. ChatError for more than an episode may hold."""
        self.images = [*self.images, *images]  # the engine may still read the list it was given
        self.shown_bytes += sum(map(len, images))
        if self.shown_bytes > MAX_EPISODE_BYTES:
            raise ChatError(
                f"turn {self.turn}: the episode has shown {self.shown_bytes} bytes of pictures, {MAX_EPISODE_BYTES} "
                "are the most: show smaller ones, or fewer"
            )


@dataclass(frozen=True, slots=True)
class Turn:
    """What was added to a conversation, and what it means to the environment."""

    segment: int
    observation: str  # chat messages as JSON
    action: str
    prompt_ids: Sequence[int]  # [P] added before sampling
    completion: Completion
    engine_seconds: float


@dataclass(frozen=True, slots=True)
class ContextOverflow:
    """There was no room for another turn; nothing was sampled."""

    prompt_tokens: (
        int  # the whole prompt, history included; the least that it has where it was not encoded whole
    )
    context_tokens: int


class Actor(Protocol):
    """Whatever plays an episode: an `Agent`, or a scripted player in its place."""

    def begin(self, seed: int) -> Conversation: ...

    def recall(self, conversation: Conversation, step: Step) -> None: ...

    async def turn(self, conversation: Conversation, observation: Observation) -> Turn | ContextOverflow: ...


class AgentSettings(BaseModel):
    """What an agent is composed of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    memory: Literal["full", "last"] = Field(
        "full",
        description="what a turn sees: the whole conversation, or the last observation alone (for environments whose "
        "observation says everything); then every turn is a segment of its own",
    )
    parts: tuple[PartSettings, ...] = Field(
        (), description="what stands between the environment and the policy, from the environment outwards"
    )
    min_new_tokens: int = Field(
        1, gt=0, description="with room for fewer tokens the episode ends: context overflow"
    )

    @model_validator(mode="after")
    def _parts_go_together(self) -> Self:
        check_together(self.parts, self.memory)
        return self


class Agent:
    """Engine, chat template and sampling put together.

    A turn may sample `sampling.max_tokens` tokens, fewer when the context holds fewer; with room for less than
    `min_new_tokens` there is no turn but a ContextOverflow.
    """

    def __init__(
        self,
        engine: Generates,
        chat: Chat,
        sampling: Sampling,
        context_tokens: int,
        settings: AgentSettings | None = None,
    ) -> None:
        self.engine = engine
        self.chat = chat
        self.engine_clock = BusyClock()
        self._sampling = sampling
        self._context_tokens = context_tokens
        self._settings = settings or AgentSettings()

    def begin(self, seed: int) -> Conversation:
        return Conversation(seed)

    def recall(self, conversation: Conversation, step: Step) -> None:
        """Put a conversation where it stood after `step`, having recalled all before it. Nothing is encoded again."""
        if step.segment != conversation.segment:
            conversation.open_segment()
            conversation.segment = step.segment
        self._note_tools(conversation, json.loads(step.observation)[0])
        conversation.sampled = step.action_ids.tolist()
        conversation.ids += step.prompt_ids.tolist() + conversation.sampled
        conversation.turn = step.turn + 1
        conversation.show(images_in(step.observation))

    async def turn(self, conversation: Conversation, observation: Observation) -> Turn | ContextOverflow:
        """Sample one turn and add it to the conversation. Raises EngineFailed."""
        messages = as_messages(observation)
        if conversation.ids and self._forgets(messages[0]):
            conversation.open_segment()
        self._require_told(conversation, messages[0])
        self._note_tools(conversation, messages[0])
        try:
            added = await off_loop(messages, partial(self._added, conversation, messages))
        except TooLong as error:
            return ContextOverflow(len(conversation.ids) + error.tokens, self._context_tokens)
        except PerceptionError as error:
            row = f"turn {conversation.turn}, segment {conversation.segment}"
            raise ChatError(f"{row}: {error}") from error
        prompt = [*conversation.ids, *added]
        room = self._context_tokens - len(prompt)
        if room < self._settings.min_new_tokens:
            return ContextOverflow(len(prompt), self._context_tokens)
        conversation.show(self.chat.images(messages))
        began = time.perf_counter()
        with self.engine_clock:
            sampling = self._turn_sampling(conversation, messages, room)
            completion = await self.engine.generate(prompt, sampling, conversation.images)
        engine_seconds = time.perf_counter() - began
        sampled = completion.token_ids.tolist()
        # The engine may still read the prompt it was given: extend a list of our own.
        conversation.ids = prompt + sampled
        conversation.sampled = sampled
        conversation.turn += 1
        action = self.chat.text(sampled)
        return Turn(conversation.segment, as_json(messages), action, added, completion, engine_seconds)

    def _forgets(self, first: Message) -> bool:
        return bool(first.get("forget")) or (self._settings.memory == "last" and not first.get("go_on"))

    def _require_told(self, conversation: Conversation, first: Message) -> None:
        """Tools are offered where a conversation begins: later ones would leave no trace in what the policy reads."""
        new = (
            [tool for tool in first.get("tools", ()) if tool not in conversation.tools]
            if conversation.ids
            else ()
        )
        if new:
            raise ChatError(
                f"turn {conversation.turn}: the environment offers {len(new)} more tools, which no "
                "conversation that goes on can tell: say forget=true beside them, so that it begins anew"
            )

    def _note_tools(self, conversation: Conversation, first: Message) -> None:
        """An environment says what can be called where it begins; a turn that sees nothing else is told each time."""
        if "tools" in first or first.get("forget"):
            conversation.tools = first.get("tools", [])

    def _added(self, conversation: Conversation, messages: Sequence[Message]) -> Sequence[int]:
        if not conversation.ids:
            tools = {"tools": conversation.tools} if conversation.tools else {}
            return self.chat.opening([messages[0] | tools, *messages[1:]])
        if messages[0].get("go_on"):
            return self.chat.going_on(messages[0], conversation.sampled)
        return self.chat.delta(messages, conversation.sampled)

    def _turn_sampling(self, conversation: Conversation, messages: Sequence[Message], room: int) -> Sampling:
        seed = derive_seed(conversation.seed, conversation.turn)
        most = min(self._sampling.max_tokens, messages[0].get("max_tokens", room), room)
        return self._sampling.model_copy(update={"seed": seed, "max_tokens": most})


def as_messages(observation: Observation) -> list[Message]:
    """An observation as chat messages: plain text is said by the user.

    TypeError for what is neither text nor a non-empty list of messages.
    """
    if isinstance(observation, str):
        return [{"role": "user", "content": observation}]
    if not isinstance(observation, list) or not all(isinstance(message, dict) for message in observation):
        raise TypeError(f"an observation must be a str or a list of message dicts, got {type(observation)}")
    if not observation:
        raise TypeError("an observation must hold at least one message")
    return observation
