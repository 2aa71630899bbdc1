"""An engine without a model, whose answers are scripted and deterministic: for tests and benchmarks."""

from __future__ import annotations

import time
from asyncio import sleep
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np

from rollout.chat.chat import Chat
from rollout.engines.engine import Completion, EngineDied, EngineFailed, Sampling, SleepLevel, derive_seed
from rollout.wire.trajectory import Float32Array
from rollout.wire.weights import SyncReport, WeightUpdate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Script = Callable[[str, Random], str]  # (prompt text, random numbers of this request) -> the assistant's text
Latency = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Request:
    """A request and its answer."""

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    completion: Completion


class ScriptedEngine:
    """Answers are a pure function of (prompt ids, pictures, sampling seed, version), in any order of requests.

    Logprobs between -1 and 0 are derived in the same way. requests: all requests in the order of completion, if
    `record` is on. latency: awaited before each answer. stop_token_ids: tokens that end a turn beside `Chat.stops`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        script: Script,
        version: int = 0,
        latency: Latency | None = None,
        *,
        name: str = "scripted",
        record: bool = True,
        stop_token_ids: Sequence[int] = (),
    ) -> None:
        self.name = name
        self.version = version
        self.requests: list[Request] = []
        self._backend = tokenizer.backend_tokenizer
        own = Chat(tokenizer).stops
        self._end = own[:1]
        self._stops = frozenset((*own, *stop_token_ids))
        self._script = script
        self._latency = latency
        self._record = record
        self._closed = False
        self.asleep = False

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, images: Sequence[str] = ()
    ) -> Completion:
        if self._closed:
            raise EngineFailed(f"{self.name}: a request came after close()")
        if self.asleep:
            raise EngineFailed(f"{self.name}: a request came while it sleeps")
        await (self._latency() if self._latency else sleep(0))
        shown = (crc32(image.encode()) for image in images)
        seed = derive_seed(sampling.seed or 0, self.version, hash(tuple(prompt_ids)), *shown)
        rng = Random(seed)
        said = self._script(self._backend.decode(prompt_ids, skip_special_tokens=False), rng)
        ids = [*self._backend.encode(said, add_special_tokens=False).ids, *self._end]
        # Like any engine, it stops at the first token that ends a turn.
        ids = ids[: next((index for index, token in enumerate(ids, 1) if token in self._stops), None)]
        kept = np.array(ids[: sampling.max_tokens], dtype=np.int32)
        completion = Completion(
            kept,
            _logprobs(kept.tolist(), seed),
            np.full(len(kept), self.version, dtype=np.int32),
            "stop" if len(kept) == len(ids) else "length",
        )
        if self._record:
            self.requests.append(Request(tuple(prompt_ids), sampling, completion))
        return completion

    async def score(self, token_ids: Sequence[int]) -> Float32Array:
        return _logprobs(list(token_ids)[1:], self.version)

    async def sync(self, update: WeightUpdate) -> SyncReport:
        """Adopt the version without loading anything."""
        began = time.perf_counter()
        await self.wake()
        self.version = update.version
        return SyncReport(
            self.name, self.version, len(update.manifest.tensors), 0.0, time.perf_counter() - began, 0.0
        )

    async def adopt_loaded(self, version: int) -> None:
        self.version = version

    async def sleep(self, level: SleepLevel) -> None:
        """Refuse requests from here on."""
        self.asleep = True

    async def wake(self) -> None:
        """Answer again."""
        self.asleep = False

    async def ping(self) -> None:
        if self._closed:
            raise EngineDied(f"{self.name}: ping() after close()")

    async def close(self) -> None:
        self._closed = True


def _logprobs(token_ids: Sequence[int], salt: int) -> Float32Array:
    # The hash of a tuple of ints is the same in every process (only str and bytes are salted).
    return np.array([-(hash((salt, token)) % 1000) / 1000 for token in token_ids], dtype=np.float32)
