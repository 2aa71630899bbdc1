"""vLLM's sleep mode, which needs a GPU, as far as the engine's part of it goes: over a stand-in for AsyncLLM."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from rollout.engines.engine import EngineFailed, Sampling, SleepingEngine
from rollout.engines.vllm_engine import VllmEngine
from rollout.engines.vllm_start import VllmSettings
from rollout.wire.weights import Probe, WeightManifest, WeightUpdate, inline

vllm = pytest.importorskip("vllm")

PROBE = Probe((1, 2, 3), (-1.0, -2.0), 0.01)


class Core:
    """A core that never dies."""

    async def answer(self, call: Coroutine[Any, Any, Any]) -> Any:
        return await call


class Llm:
    """Notes what it is asked, and gives the probe's logprobs."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.version = "-1"

    def __getattr__(self, name: str) -> Any:
        async def note(*given: Any, **named: Any) -> Any:
            self.calls.append((name, *given, *named.values()) if name == "sleep" else name)
            if name == "update_weight_version":
                (self.version,) = given
            return [""] if name == "collective_rpc" else None  # of every process, no failure

        return note

    async def get_weight_version(self) -> str:
        return self.version

    async def generate(self, *given: Any, **named: Any) -> AsyncIterator[Any]:
        self.calls.append("generate")
        chosen = zip(PROBE.token_ids[1:], PROBE.logprobs, strict=True)
        ranks = [{token: SimpleNamespace(logprob=logprob)} for token, logprob in chosen]
        yield SimpleNamespace(prompt_logprobs=[None, *ranks])


def test_an_engine_sleeps_without_requests_and_wakes_up_for_its_next_version() -> None:
    llm: Any = Llm()
    engine = VllmEngine(llm, Core(), "rollout-0", [0], [], VllmSettings())  # type: ignore[arg-type]
    assert isinstance(engine, SleepingEngine)

    async def run() -> None:
        update = WeightUpdate(WeightManifest(4, (), PROBE), inline([]))
        await engine.sync(update)
        before = list(llm.calls)
        llm.calls.clear()
        await engine.sleep(2)
        assert llm.calls == [("sleep", 2, "abort")]
        for request in (engine.generate([1], Sampling()), engine.score([1, 2])):
            with pytest.raises(EngineFailed, match=r"^rollout-0 sleeps: "):
                await request
        llm.calls.clear()
        await engine.sync(update)
        # What a sync does, the connection that is made once left out, with memory for it first.
        assert llm.calls == ["wake_up", *(call for call in before if call != "init_weight_transfer_engine")]
        assert llm.calls[-1] == "generate" and engine.version == 4
        await engine.score([1, 2, 3])

    asyncio.run(run())
