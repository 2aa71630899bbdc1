"""One foreign episode, between the server that hears its program and the replica that answers for the policy.

    server                                session                         replica
    a request            ask    ->        calls, in order of arrival      next   ->  a call, answered by `reply`
    a posted verdict     post   ->        behind the calls before it      next   ->  the verdict
    the program's end    leave  ->        behind the calls before it      next   ->  how it left

A client that hung up is not answered: its call is passed over while it waits. Where the policy is at work for it
already, and the client asks the same again (clients repeat themselves after a timeout), it gets that very answer, also
where it asked again before the server knew that it had hung up.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from numbers import Number
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, ValidationError

from envs.base import as_number
from rollout.external.openai_format import Answer, Asked, Refused


def _number(value: Any) -> float:
    try:
        return as_number(value, "a reward")
    except (TypeError, OverflowError) as error:
        raise ValueError(str(error)) from None


_Reward = Annotated[FiniteFloat, BeforeValidator(_number)]


class Verdict(BaseModel):
    """What an episode came to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reward: _Reward
    success: bool | None = Field(None, description="where there is such a thing")
    rewards: dict[str, _Reward] | None = Field(None, description="what the reward is made of")
    end: Literal["terminated", "truncated", "malformed"] = Field(
        "terminated",
        description="truncated: a limit of the program's own cut it; malformed: it could not read",
    )

    @classmethod
    def read(cls, value: Any) -> Verdict:
        """A number, or an object with the fields above. ValueError, one line, for anything else."""
        try:
            return cls.model_validate({"reward": value} if isinstance(value, Number) else value)
        except ValidationError:
            raise ValueError(
                f"a reward is a finite number, or an object of reward, success, rewards and end; got {value!r:.200}"
            ) from None


@dataclass(frozen=True, slots=True)
class Left:
    """How a program ended by itself."""

    failure: str | None  # why it is no evidence; None for one that ended well
    output: str  # the end of what it printed
    result: Any = None  # what it returned, or its last line where that is a JSON object
    error: BaseException | None = None  # the cause of the failure, where there is one


class Call:
    """A request that waits for the policy."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.gone = False  # its client hung up
        self.answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def refuse(self, error: Refused) -> None:
        self.answer.set_exception(error)
        self.answer.exception()  # its client may be gone, and then nobody takes it


class Session:
    """The calls of one episode. Of one event loop."""

    def __init__(self, key: str) -> None:
        self.key = key
        self._events: asyncio.Queue[Call | Verdict | Left] = asyncio.Queue()
        self._open: dict[Call, None] = {}  # not answered yet, in order of arrival
        self._taken: Call | None = None  # the last one given to the policy
        self._over = False  # nothing may follow what is in the queue

    def ask(self, asked: Asked) -> Call:
        """A call for this request. Raises Refused after the end."""
        self._refuse_late()
        taken = self._taken
        if taken is not None and taken.gone and taken.asked == asked:
            taken.gone = False
            return taken
        call = Call(asked)
        self._open[call] = None
        call.answer.add_done_callback(lambda _: self._open.pop(call))
        self._events.put_nowait(call)
        return call

    def post(self, verdict: Verdict) -> None:
        """The episode's end, as its program says it. Raises Refused after the end."""
        self._refuse_late()
        self._over = True
        self._events.put_nowait(verdict)

    def leave(self, left: Left) -> None:
        """The episode's end, where its program ended without a word."""
        if not self._over:
            self._over = True
            self._events.put_nowait(left)

    async def next(self) -> Call | Verdict | Left:
        """Whatever comes next; the limit is the caller's."""
        while isinstance(event := await self._events.get(), Call):
            if event.answer.done():  # with what was sampled for an earlier one
                continue
            if not event.gone:
                self._taken = event
                break
            event.answer.cancel()
        return event

    def reply(self, call: Call, answer: Answer) -> None:
        """Answer a call that `next` gave; where its client hung up, also the first call that asks the same."""
        if call.gone and (heir := self._waiting_like(call)) is not None:
            heir.answer.set_result(answer)
            call.gone = False  # somebody has it: who asks the same once more wants another
        call.answer.set_result(answer)

    def end(self) -> None:
        """The episode is over: whoever still waits is told so."""
        self._over = True
        for call in self._open:
            if call.gone:
                call.answer.cancel()
            elif not call.answer.done():
                call.answer.set_exception(ended())

    def _waiting_like(self, call: Call) -> Call | None:
        waiting = (each for each in self._open if each is not call and not (each.gone or each.answer.done()))
        return next((each for each in waiting if each.asked == call.asked), None)

    def _refuse_late(self) -> None:
        if self._over:
            raise ended()


def ended() -> Refused:
    """What a request is told after its episode's end."""
    return Refused(409, "episode_ended", "this episode has ended: it was judged, cut short or given up")
