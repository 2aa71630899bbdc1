"""An agent: from an observation to a prompt, to sampled tokens, to an action."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from envs.base import Message, Observation, messages_of
from rollout.agents.settings import PartSettings, check_together
from rollout.chat.chat import Chat, ChatError, TooLong, as_json
from rollout.chat.long_text import off_loop
from rollout.chat.perception import PerceptionError
from rollout.engines.engine import Completion, Generates, Sampling, derive_seed
from rollout.wire.images import MAX_EPISODE_BYTES, images_in
from rollout.wire.trajectory import Turn


@dataclass(slots=True)
class Conversation:
    """State of one episode's conversation; many of them share an agent."""

    seed: int  # every turn samples with a seed derived from it
    ids: list[int] = field(default_factory=list)  # all tokens of the current segment
    segment: int = 0
    turn: int = 0
    sampled: list[int] = field(default_factory=list)  # the last turn's action
    tools: list[dict[str, Any]] = field(default_factory=list)  # schemas of the tools that were announced last
    images: list[str] = field(default_factory=list)  # the pictures of the current segment, as data URLs
    shown_bytes: int = 0  # of all pictures so far

    def open_segment(self) -> None:
        """Begin a segment without history; stored segments stay unchanged."""
        self.segment += 1
        self.ids = []
        self.sampled = []
        self.images = []

    def show(self, images: Sequence[str]) -> None:
        """Add pictures to the segment. ChatError for more bytes than an episode may hold."""
        self.images = [*self.images, *images]  # a new list: the engine may still read the old one
        self.shown_bytes += sum(map(len, images))
        if self.shown_bytes > MAX_EPISODE_BYTES:
            raise ChatError(
                f"turn {self.turn}: the episode has shown {self.shown_bytes} bytes of pictures, more than "
                f"{MAX_EPISODE_BYTES}; show smaller ones, or fewer"
            )


@dataclass(frozen=True, slots=True)
class SampledTurn:
    """A sampled turn: the tokens added to a conversation, and the action for the environment."""

    segment: int
    observation: str  # chat messages as JSON
    action: str
    prompt_ids: Sequence[int]  # [P] added before sampling
    completion: Completion
    engine_seconds: float


@dataclass(frozen=True, slots=True)
class ContextOverflow:
    """The context has no room for another turn; nothing was sampled."""

    prompt_tokens: int  # of the whole prompt, history included; a lower bound where it was not encoded whole
    context_tokens: int


class Actor(Protocol):
    """Plays an episode: an `Agent`, or a scripted player (`Demonstrator`)."""

    def begin(self, seed: int) -> Conversation: ...

    def recall(self, conversation: Conversation, turn: Turn) -> None: ...

    async def turn(
        self, conversation: Conversation, observation: Observation
    ) -> SampledTurn | ContextOverflow: ...


class AgentSettings(BaseModel):
    """Memory and parts of an agent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    memory: Literal["full", "last"] = Field(
        "full",
        description="what the prompt of a turn contains. full: the whole conversation. last: only the latest "
        "observation, so that every turn is a segment of its own; for environments whose "
        "observation is the complete state",
    )
    parts: tuple[PartSettings, ...] = Field(
        (),
        description="agent parts that wrap the environment, from the innermost to the outermost. The default "
        "is none",
    )
    min_new_tokens: int = Field(
        1,
        gt=0,
        description="tokens that must be free in the context before a turn; with fewer, the episode ends as a "
        "context overflow",
    )

    @model_validator(mode="after")
    def _parts_go_together(self) -> Self:
        check_together(self.parts, self.memory)
        return self


class BusyClock:
    """Wall time during which at least one of many concurrent users is inside: `with clock: await request`."""

    def __init__(self) -> None:
        self._users = 0
        self._since = 0.0
        self._total = 0.0

    @property
    def seconds(self) -> float:
        """Wall time with at least one user, up to now."""
        return self._total + (time.perf_counter() - self._since if self._users else 0.0)

    def __enter__(self) -> None:
        if not self._users:
            self._since = time.perf_counter()
        self._users += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._users -= 1
        if not self._users:
            self._total += time.perf_counter() - self._since


class Agent:
    """Engine, chat template and sampling.

    A turn samples up to `sampling.max_tokens` tokens, or what the context has room for; with room for fewer than
    `min_new_tokens`, `turn` returns a ContextOverflow. engine_clock: shared by all agents of one engine.
    """

    def __init__(
        self,
        engine: Generates,
        chat: Chat,
        sampling: Sampling,
        context_tokens: int,
        settings: AgentSettings | None = None,
        engine_clock: BusyClock | None = None,
    ) -> None:
        self.engine = engine
        self.chat = chat
        self.engine_clock = engine_clock or BusyClock()
        self._sampling = sampling
        self._context_tokens = context_tokens
        self._settings = settings or AgentSettings()

    def sampled_by(self, change: Callable[[Sampling], Sampling]) -> Agent:
        """The same agent with another sampling, on the same engine and clock."""
        other = copy(self)
        other._sampling = change(self._sampling)
        return other

    def begin(self, seed: int) -> Conversation:
        return Conversation(seed)

    def recall(self, conversation: Conversation, turn: Turn) -> None:
        """Append a stored turn to a conversation, without encoding it again. Turns must be recalled in order."""
        if turn.segment != conversation.segment:
            conversation.open_segment()
            conversation.segment = turn.segment
        self._note_tools(conversation, json.loads(turn.observation)[0])
        conversation.sampled = turn.action_ids.tolist()
        conversation.ids += turn.prompt_ids.tolist() + conversation.sampled
        conversation.turn = turn.turn + 1
        conversation.show(images_in(turn.observation))

    async def turn(
        self, conversation: Conversation, observation: Observation
    ) -> SampledTurn | ContextOverflow:
        """Sample one turn and add it to the conversation. Raises EngineFailed."""
        messages = messages_of(observation)
        if messages[0].get("opponent"):
            raise ChatError(
                f"turn {conversation.turn}: the environment asks for the move of an opponent, but nobody of this run "
                "plays that seat; add the section league, or choose another opponent of the environment"
            )
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
        # A new list: the engine may still read the prompt.
        conversation.ids = prompt + sampled
        conversation.sampled = sampled
        conversation.turn += 1
        action = self.chat.text(sampled)
        return SampledTurn(conversation.segment, as_json(messages), action, added, completion, engine_seconds)

    def _forgets(self, first: Message) -> bool:
        return bool(first.get("reset_context")) or (
            self._settings.memory == "last" and not first.get("continue_turn")
        )

    def _require_told(self, conversation: Conversation, first: Message) -> None:
        """Raise ChatError for tools that are announced later than a segment's first message, which no prompt shows."""
        new = (
            [tool for tool in first.get("tools", ()) if tool not in conversation.tools]
            if conversation.ids
            else ()
        )
        if new:
            raise ChatError(
                f"turn {conversation.turn}: the environment announces {len(new)} more tools in the middle of a "
                "conversation, where no prompt shows them; set reset_context=true beside them to begin a new one"
            )

    def _note_tools(self, conversation: Conversation, first: Message) -> None:
        """Keep the announced tools for later segments, which repeat them."""
        if "tools" in first or first.get("reset_context"):
            conversation.tools = first.get("tools", [])

    def _added(self, conversation: Conversation, messages: Sequence[Message]) -> Sequence[int]:
        if not conversation.ids:
            tools = {"tools": conversation.tools} if conversation.tools else {}
            return self.chat.opening([messages[0] | tools, *messages[1:]])
        if messages[0].get("continue_turn"):
            return self.chat.continue_turn(messages[0], conversation.sampled)
        return self.chat.delta(messages, conversation.sampled)

    def _turn_sampling(self, conversation: Conversation, messages: Sequence[Message], room: int) -> Sampling:
        seed = derive_seed(conversation.seed, conversation.turn)
        most = min(self._sampling.max_tokens, messages[0].get("max_tokens", room), room)
        return self._sampling.model_copy(update={"seed": seed, "max_tokens": most})
