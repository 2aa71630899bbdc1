"""A user's own engine with checks of its answers and its syncs.

An answer must be complete and valid: as many logprobs and versions as tokens, in their ranges. A sync succeeds only if
the bytes have the learner's checksums, the engine reports the version, and the probe's logprobs match the learner's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from envs.code_lines import describe_error
from rollout.engines.engine import Completion, Engine, EngineDied, EngineFailed, EngineStart, Sampling
from rollout.wire.trajectory import Float32Array
from rollout.wire.weights import SyncReport, WeightMismatch, WeightUpdate

METHODS = ("generate", "score", "sync", "adopt_loaded", "ping", "close")
_MOST_LOGPROB = 1e-4  # a logprob may be above 0 by rounding


class CheckedEngine:
    """Passes every call on to the user's engine and checks the answers."""

    def __init__(self, engine: Any, start: EngineStart) -> None:
        if missing := [name for name in METHODS if not callable(getattr(engine, name, None))]:
            raise TypeError(
                f"{start.name}: {type(engine).__name__} is not an Engine: it has no method {', '.join(missing)}"
            )
        self.name = start.name
        self._engine: Engine = engine
        self._stops = frozenset(start.stop_token_ids)

    @property
    def version(self) -> int:
        return self._engine.version

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, images: Sequence[str] = ()
    ) -> Completion:
        """Sample a completion. Raises EngineFailed for errors of the user's code and for invalid answers."""
        before = self.version
        try:
            completion = await self._engine.generate(prompt_ids, sampling, images)
        except (EngineFailed, EngineDied):
            raise
        except Exception as error:  # foreign code
            raise EngineFailed(f"{self.name}: generate raised {describe_error(error)}") from error
        if fault := _fault(completion, sampling, self._stops, (before, self.version)):
            raise EngineFailed(f"{self.name}: generate returned {fault}")
        return completion

    async def score(self, token_ids: Sequence[int]) -> Float32Array:
        return await self._engine.score(token_ids)

    async def sync(self, update: WeightUpdate) -> SyncReport:
        """Verify the checksums, let the engine load the version, then check its version and the probe."""
        await asyncio.to_thread(update.verify)
        report = await self._engine.sync(update)
        if self.version != update.version:
            raise WeightMismatch(
                f"{self.name}: after the sync to version {update.version} the engine's version is {self.version}"
            )
        probe = update.manifest.probe
        difference = probe.check(self.name, self.version, await self.score(probe.token_ids))
        return replace(report, engine=self.name, version=self.version, probe_difference=difference)

    async def adopt_loaded(self, version: int) -> None:
        await self._engine.adopt_loaded(version)

    async def ping(self) -> None:
        await self._engine.ping()

    async def close(self) -> None:
        await self._engine.close()


def _fault(given: Any, sampling: Sampling, stops: frozenset[int], versions: tuple[int, int]) -> str:
    """The error of an answer, or "". versions: of the engine at the start and the end of the request."""
    if not isinstance(given, Completion):
        return f"{type(given).__name__}, not a Completion"
    tokens = len(given.token_ids)
    if not 1 <= tokens <= sampling.max_tokens:
        return f"{tokens} tokens; 1 to {sampling.max_tokens} were requested"
    if len(given.logprobs) != tokens or len(given.versions) != tokens:
        return f"{tokens} tokens with {len(given.logprobs)} logprobs and {len(given.versions)} versions"
    low, high = np.min(given.logprobs), np.max(given.logprobs)
    if not (np.isfinite(low) and high <= _MOST_LOGPROB):
        return f"logprobs from {low:g} to {high:g}: they must be finite and at most 0"
    first, last = np.min(given.versions), np.max(given.versions)
    if first < versions[0] or last > versions[1]:
        return f"versions {first} to {last}; {versions[0]} to {versions[1]} were loaded"
    if given.finish_reason not in ("stop", "length"):
        return f"finish_reason={given.finish_reason!r}; it must be 'stop' or 'length'"
    if given.finish_reason == "stop" and int(given.token_ids[-1]) not in stops:
        return f"finish_reason='stop' after token {given.token_ids[-1]}, which is no stop token"
    return ""
