"""Rollout throughput: tokens per second through a whole worker against the same requests on a bare AsyncLLM.

The worker plays FrozenLake as the main recipe does, through environments, chat, groups, Arrow rows and a store on disk.
Every round's requests are then replayed on bare engines: the turns of an episode one after the other, the siblings of a
group at once, as many groups at once, each request for the number of tokens it had. Prints JSON.

ratio                of the worker's rate, to that of an engine with the same options, as vLLM itself starts it
ratio_to_own         to that of the worker's own engine, whose processes are fewer and wait asleep
ratio_to_rendered    the same with requests in the form in which Manta hands them over, which spares vLLM a thread
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from deploy.assembly.build import load_tokenizer
from deploy.config.config import RunConfig
from rollout.agents.agent import Agent
from rollout.buffer.replay_buffer import ReplayBuffer
from rollout.buffer.replay_store import BufferSettings, ReplayStore
from rollout.chat.chat import Chat
from rollout.engines.vllm_engine import VllmEngine
from rollout.episodes.pool import EnvironmentPool
from rollout.episodes.tasks import TaskStream
from rollout.episodes.worker import RolloutWorker
from rollout.wire.schema import decode
from rollout.wire.trajectory import Trajectory
from tests.bench.player import playing_model, recipe

STEPS, GROUPS_PER_STEP, ROUNDS, WARM_UP = 6, 16, 7, 2
# A prompt as vLLM's documentation gives it, and as its renderer leaves it, which is what Manta hands over.
PLAIN: Mapping[str, str] = {}
RENDERED: Mapping[str, str] = {"type": "token"}

Request = tuple[list[int], int]  # prompt ids, tokens sampled


@dataclass(frozen=True)
class Played:
    """One round of the worker: what it took and what it asked for, as group > episode > request."""

    seconds: float
    requests: list[list[list[Request]]]

    @property
    def tokens(self) -> int:
        return sum(count for group in self.requests for episode in group for _, count in episode)

    @property
    def turns(self) -> int:
        return sum(len(episode) for group in self.requests for episode in group)


class Rig:
    """One engine, reached through a worker or directly."""

    def __init__(self, config: RunConfig, folder: Path, path: str) -> None:
        self._config = config
        self._folder = folder
        self._path = path
        tokenizer = load_tokenizer(path)
        self._chat = Chat(tokenizer)
        self._stop = tokenizer.eos_token_id
        self._pool = EnvironmentPool()
        self._request_ids = itertools.count()
        counts = range(1, config.sampling.max_tokens + 1)
        self._params = {count: _exactly(count, config.sampling.temperature) for count in counts}

    async def start(self) -> None:
        config = self._config
        self._engine = await VllmEngine.start(
            "rollout-0", self._path, [self._stop], config.rollout.context_tokens, config.engine
        )
        self._own = self._engine._llm  # the bare engine: no part of what Manta offers
        self._plain = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=self._path,
                dtype=config.engine.dtype,
                max_model_len=config.rollout.context_tokens,
                max_num_seqs=config.engine.max_num_seqs,
                kv_cache_memory_bytes=config.engine.kv_cache_bytes(on_gpu=False),
                enforce_eager=True,
                skip_tokenizer_init=True,
                disable_log_stats=True,
            )
        )

    async def play(self, seed: int) -> Played:
        """A run of STEPS steps' groups that nobody learns from; slots are never short."""
        config = self._config
        await self._engine.adopt_loaded(
            seed
        )  # another version: earlier rounds' prefixes are of no use to this one
        tasks = TaskStream(config.env.id, config.env.options, seed)
        buffer = BufferSettings(groups_per_step=GROUPS_PER_STEP, max_lag=STEPS)
        replay_buffer = ReplayBuffer(
            ReplayStore(self._folder / f"run-{seed}", tasks, buffer, total_steps=STEPS)
        )
        agent = Agent(self._engine, self._chat, config.sampling, config.rollout.context_tokens, config.agent)
        worker = RolloutWorker(
            "rollout-0", self._engine, agent, replay_buffer, config.rollout, seed, self._pool
        )
        began = time.perf_counter()
        _, batches = await asyncio.gather(worker.run(), _take_all(replay_buffer))
        seconds = time.perf_counter() - began
        await replay_buffer.close()
        groups = [decode(batch) for batch in batches]
        return Played(seconds, [[_requests(episode) for episode in group.trajectories] for group in groups])

    async def replay(
        self, played: Played, salt: str, own: bool = True, form: Mapping[str, str] = PLAIN
    ) -> float:
        """Seconds for the same requests without us. `salt` keeps earlier rounds' prefixes out of the cache."""
        waiting = iter(played.requests)
        prompt, llm = {"cache_salt": salt, **form}, self._own if own else self._plain

        async def worker_loop() -> None:
            for group in waiting:
                await asyncio.gather(*(self._episode(llm, requests, prompt) for requests in group))

        began = time.perf_counter()
        await asyncio.gather(*(worker_loop() for _ in range(self._config.rollout.concurrent_groups)))
        return time.perf_counter() - began

    async def close(self) -> None:
        self._plain.shutdown()
        await self._engine.close()

    async def _episode(self, llm: AsyncLLM, requests: Sequence[Request], rest: Mapping[str, str]) -> None:
        for prompt_ids, count in requests:
            prompt = {"prompt_token_ids": prompt_ids, **rest}
            async for _ in llm.generate(prompt, self._params[count], f"bare-{next(self._request_ids)}"):
                pass


def _exactly(count: int, temperature: float) -> Any:
    return SamplingParams(
        temperature=temperature,
        max_tokens=count,
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


async def _take_all(replay_buffer: ReplayBuffer) -> list[pa.RecordBatch]:
    batches: list[pa.RecordBatch] = []
    for version in range(1, STEPS + 1):
        batches += await replay_buffer.take(version - 1, 120)
        await replay_buffer.release(version)
    return batches


def _requests(episode: Trajectory) -> list[Request]:
    requests: list[Request] = []
    segment, history = -1, list[int]()
    for step in episode.turns:
        if step.segment != segment:
            segment, history = step.segment, []
        prompt = history + step.prompt_ids.tolist()
        requests.append((prompt, len(step.action_ids)))
        history = prompt + step.action_ids.tolist()
    return requests


async def _measure(config: RunConfig, folder: Path, path: str) -> list[dict[str, float]]:
    # The engine's front end belongs to the event loop it is started on.
    rig = Rig(config, folder, path)
    await rig.start()
    rounds = []
    try:
        for seed in range(WARM_UP + ROUNDS):
            played = await rig.play(seed)
            bare = await rig.replay(played, f"bare-{seed}", own=False)
            own = await rig.replay(played, f"own-{seed}")
            rendered = await rig.replay(played, f"rendered-{seed}", form=RENDERED)
            rounds.append(
                {
                    "worker_tokens_per_s": played.tokens / played.seconds,
                    "bare_tokens_per_s": played.tokens / bare,
                    "worker_turns_per_s": played.turns / played.seconds,
                    "ratio": bare / played.seconds,
                    "ratio_to_own": own / played.seconds,
                    "ratio_to_rendered": rendered / played.seconds,
                }
            )
    finally:
        await rig.close()
    return rounds[WARM_UP:]


def main() -> dict[str, float]:
    """Medians of the rounds; `ratio` is the worker's tokens per second by a bare engine's (target: at least 0.9)."""
    config = recipe()
    with tempfile.TemporaryDirectory() as name:
        path = playing_model(config, Path(name))
        rounds = asyncio.run(_measure(config, Path(name), path))
    ratios = sorted(one["ratio"] for one in rounds)
    medians = {figure: round(statistics.median(one[figure] for one in rounds), 3) for figure in rounds[0]}
    return medians | {"ratio_lowest": round(ratios[0], 3), "ratio_highest": round(ratios[-1], 3)}


if __name__ == "__main__":
    print(json.dumps(main()))
