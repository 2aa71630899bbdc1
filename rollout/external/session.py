"""The session of one foreign episode, between the server with its program's requests and the replica that answers them.

    server                                session                         replica
    a request            ask    ->        requests, in order of arrival   next   ->  a request, answered by `reply`
    a posted verdict     post   ->        after the requests before it    next   ->  the verdict
    the program's exit   leave  ->        after the requests before it    next   ->  the exit

A request whose client has disconnected is skipped while it waits. If the policy already works on it and the client
sends the same request again (clients do after a timeout), that request gets the same answer, even if it arrived before
the server noticed the disconnection.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from numbers import Number
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, ValidationError

from envs.base import as_number
from rollout.external.openai_format import ChatReply, ChatRequest, Refused


def _number(value: Any) -> float:
    try:
        return as_number(value, "a reward")
    except (TypeError, OverflowError) as error:
        raise ValueError(str(error)) from None


_Reward = Annotated[FiniteFloat, BeforeValidator(_number)]


class EpisodeVerdict(BaseModel):
    """A program's judgement of its episode: reward and success."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reward: _Reward = Field(description="reward of the episode")
    success: bool | None = Field(
        None, description="whether the task was solved; null where that is undefined"
    )
    rewards: dict[str, _Reward] | None = Field(
        None, description="named components of the reward, recorded as metrics"
    )
    end: Literal["terminated", "truncated", "malformed"] = Field(
        "terminated",
        description="how the episode ended. terminated: in a final state. truncated: at a limit of the "
        "program. malformed: the program could not read the policy's answer",
    )

    @classmethod
    def read(cls, value: Any) -> EpisodeVerdict:
        """Parse a number, or an object with the fields above. ValueError, one line, for anything else."""
        try:
            return cls.model_validate({"reward": value} if isinstance(value, Number) else value)
        except ValidationError:
            raise ValueError(
                f"a reward is a finite number, or an object of reward, success, rewards and end; got {value!r:.200}"
            ) from None


@dataclass(frozen=True, slots=True)
class ProgramExit:
    """How a program exited."""

    failure: str | None  # why the episode has failed; None for a normal exit
    output: str  # the end of its output
    result: Any = None  # what a function returned, or the last line of output if that is a JSON object
    error: BaseException | None = None  # the cause of the failure, if known


class PendingRequest:
    """A request that waits for the policy."""

    def __init__(self, asked: ChatRequest) -> None:
        self.asked = asked
        self.hung_up = False  # its client has disconnected
        self.answer: asyncio.Future[ChatReply] = asyncio.get_running_loop().create_future()

    def refuse(self, error: Refused) -> None:
        self.answer.set_exception(error)
        self.answer.exception()  # mark as retrieved: its client may have disconnected


class Session:
    """Requests of one episode, on one event loop."""

    def __init__(self, key: str) -> None:
        self.key = key
        self._events: asyncio.Queue[PendingRequest | EpisodeVerdict | ProgramExit] = asyncio.Queue()
        self._open: dict[PendingRequest, None] = {}  # not answered yet, in order of arrival
        self._taken: PendingRequest | None = None  # the last one that the policy got
        self._over = False  # later requests are refused

    def ask(self, asked: ChatRequest) -> PendingRequest:
        """Queue a request. Raises Refused after the episode's end."""
        self._refuse_late()
        taken = self._taken
        if taken is not None and taken.hung_up and taken.asked == asked:
            taken.hung_up = False
            return taken
        call = PendingRequest(asked)
        self._open[call] = None
        call.answer.add_done_callback(lambda _: self._open.pop(call))
        self._events.put_nowait(call)
        return call

    def post(self, verdict: EpisodeVerdict) -> None:
        """End the episode with the program's verdict. Raises Refused after the episode's end."""
        self._refuse_late()
        self._over = True
        self._events.put_nowait(verdict)

    def leave(self, left: ProgramExit) -> None:
        """End the episode with the program's exit, unless a verdict was posted."""
        if not self._over:
            self._over = True
            self._events.put_nowait(left)

    async def next(self) -> PendingRequest | EpisodeVerdict | ProgramExit:
        """Wait for the next request, verdict or exit; the caller sets a time limit."""
        while isinstance(event := await self._events.get(), PendingRequest):
            if event.answer.done():  # by the answer to an identical earlier request
                continue
            if not event.hung_up:
                self._taken = event
                break
            event.answer.cancel()
        return event

    def reply(self, call: PendingRequest, answer: ChatReply) -> None:
        """Answer a request that `next` returned; if its client has disconnected, also the first identical request."""
        if call.hung_up and (heir := self._waiting_like(call)) is not None:
            heir.answer.set_result(answer)
            call.hung_up = False  # delivered: a further identical request is a new one
        call.answer.set_result(answer)

    def end(self) -> None:
        """End the episode: refuse all pending requests."""
        self._over = True
        for call in self._open:
            if call.hung_up:
                call.answer.cancel()
            elif not call.answer.done():
                call.answer.set_exception(ended())

    def _waiting_like(self, call: PendingRequest) -> PendingRequest | None:
        waiting = (
            each for each in self._open if each is not call and not (each.hung_up or each.answer.done())
        )
        return next((each for each in waiting if each.asked == call.asked), None)

    def _refuse_late(self) -> None:
        if self._over:
            raise ended()


def ended() -> Refused:
    """The error for requests after their episode's end."""
    return Refused(409, "episode_ended", "this episode has ended; stop sending requests with this key")
