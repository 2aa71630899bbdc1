"""vLLM's AsyncLLM behind the Engine protocol: token ids in; ids, logprobs and weight versions out.

Weights are replaced in flight: generation is paused with its requests kept, the tensors are loaded, generation resumes.
An engine that was started for an adapter (vllm_adapter.py) keeps its checkpoint's weights and replaces the adapter
only. What is asked of it is in vllm_requests.py.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from rollout.engines.engine import (
    FINITE_PROBE,
    Completion,
    EngineDied,
    EngineStart,
    Generates,
    Sampling,
    SleepLevel,
    require_awake,
    require_finite,
)
from rollout.engines.vllm_checkpoint import checkpoint_names, require_layers
from rollout.engines.vllm_requests import Requests
from rollout.engines.vllm_start import VllmSettings, prepare_process, start_llm
from rollout.wire.adapter import AdapterSpec
from rollout.wire.trajectory import Float32Array
from rollout.wire.weights import SyncReport, WeightManifest, WeightMismatch, WeightUpdate

if TYPE_CHECKING:
    from rollout.chat.perception import Perception
    from rollout.engines.vllm_process import CoreProcess

T = TypeVar("T")


async def start(start: EngineStart, settings: VllmSettings) -> VllmEngine:
    """Start the engine of a run; see `VllmEngine.start`."""
    return await VllmEngine.start(
        start.name,
        start.model,
        start.stop_token_ids,
        start.context_tokens,
        settings,
        on_gpu=start.on_gpu,
        transfer=start.transfer,
        adapter=start.adapter,
        perception=start.perception,
        trusted=start.trust_remote_code,
        routing=start.routing,
        sleeps=start.sleeps,
    )


class VllmEngine:
    """One vLLM instance. `version` is -1 until the first sync or `adopt_loaded`."""

    def __init__(
        self,
        llm: Any,
        core: CoreProcess,
        name: str,
        stop_token_ids: Sequence[int],
        weight_names: Sequence[str],
        settings: VllmSettings,
        perception: Perception | None = None,
    ):
        self.version = -1
        self.name = name
        self._llm = llm
        self._core = core
        self._weight_names = frozenset(weight_names)
        self._settings = settings
        self._requests = Requests(llm, core, name, stop_token_ids, settings.seeded, perception)
        self._adapter: Any = None  # LoRA request of prompts, once an adapter was loaded
        self._beside: dict[str, Any] = {}  # LoRA requests of the adapters that are served side by side
        self._updating = False  # a version was begun, and neither finished nor given up
        self._paused_at = 0.0
        self._asleep = False  # until the first sync after it woke up

    @classmethod
    async def start(
        cls,
        name: str,
        model: str,
        stop_token_ids: Sequence[int],
        context_tokens: int,
        settings: VllmSettings,
        *,
        on_gpu: bool = False,
        transfer: str = "object_store",
        adapter: AdapterSpec | None = None,
        adapters: Mapping[str, Path] = MappingProxyType({}),
        perception: Perception | None = None,
        trusted: bool = False,
        routing: bool = False,
        sleeps: bool = False,
    ) -> VllmEngine:
        """Start the engine's processes (about 20 s on two cores); they end with this process and the loop's thread.

        adapter: versions are such adapters for the weights of `model`. adapters: folders of adapters to serve side by
        side, by name (`generate`, `with_adapter`); only one of the two may be given. ValueError if the model lacks a
        layer of an adapter. perception: of a model with vision. trusted: code that comes with the model may be
        executed. routing: completions have the experts of their tokens; of a mixture of experts. sleeps: it will be
        told to sleep, on a GPU.
        """
        if adapter and adapters:
            raise ValueError(
                f"{name}: an engine serves either the versions of one adapter or adapters side by side"
            )
        specs = [adapter] if adapter else [AdapterSpec.read(folder) for folder in adapters.values()]
        forked = prepare_process(settings, on_gpu, transfer)
        from rollout.engines.vllm_adapter import loaded_beside
        from rollout.engines.vllm_process import CoreProcess, ending_with_us, unlink_shared_memory

        names = checkpoint_names(model, trusted)
        require_layers(name, model, names, specs, learned=adapter is not None)
        with ending_with_us(forked):
            sees = perception is not None
            words = on_gpu, specs, sees, trusted, routing, sleeps
            llm = start_llm(model, context_tokens, settings, *words)
        core = CoreProcess(name, *llm.engine_core.resources.engine_manager.processes)
        names = adapter.names if adapter else names
        engine = cls(llm, core, name, stop_token_ids, names, settings, perception)
        await engine.ping()
        try:
            engine._beside = await loaded_beside(adapters, lambda each: engine._asked(llm.add_lora(each)))
        except ValueError:
            await engine.close()
            raise
        unlink_shared_memory(core.pids)
        # Objects of the start-up live as long as the process: the collector need not scan them again.
        gc.collect()
        gc.freeze()
        return engine

    def with_adapter(self, name: str) -> Generates:
        """The engine for an agent of one adapter. ValueError for a name that it was not started with."""
        from rollout.engines.vllm_adapter import WithAdapter

        self._lora(name)
        return WithAdapter(self, name)

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        images: Sequence[str] = (),
        *,
        adapter: str | None = None,
    ) -> Completion:
        """Sample one completion; its last token is the stop token unless it was cut at max_tokens.

        adapter: one of those served side by side; without one it is the policy. Requests of all of them share batches.
        """
        require_awake(self.name, self._asleep)
        return await self._requests.sample(prompt_ids, sampling, images, self.version, self._lora(adapter))

    async def score(self, token_ids: Sequence[int], *, adapter: str | None = None) -> Float32Array:
        """[T-1] logprob of every token after the first, at temperature 1; adapter: as of `generate`."""
        require_awake(self.name, self._asleep)
        return await self._requests.score(token_ids, self.version, self._lora(adapter))

    async def sync(self, update: WeightUpdate) -> SyncReport:
        """Replace the weights in flight and verify names, checksums, version and probe. Raises EngineDied.

        After a WeightMismatch before loading began, the engine serves the old weights. After a later one it stays
        paused: an engine with half a version must not sample. A native transfer that has failed may precede it.
        """
        began = time.perf_counter()
        update.manifest.require_names(self._weight_names, self.name)
        await asyncio.to_thread(update.verify)  # while generation runs
        if self._asleep:
            await self.wake()
        report = await (self._sync_adapter if update.manifest.adapter else self._sync_weights)(update)
        return replace(report, seconds=time.perf_counter() - began)

    async def _sync_weights(self, update: WeightUpdate) -> SyncReport:
        await self.begin_update(update.manifest)
        await self._loaded(update, self.receive({"update": update.to_plain()}))
        await self._loaded(update, self._finish(update.version))
        return await self._serve(update.manifest)

    async def _sync_adapter(self, update: WeightUpdate) -> SyncReport:
        from rollout.engines import vllm_adapter

        with TemporaryDirectory(prefix="manta-adapter-") as folder:
            loading = await asyncio.to_thread(vllm_adapter.write, update, Path(folder))
            await self._pause()
            await self._loaded(update, self._asked(self._llm.add_lora(loading)))
        self._adapter = vllm_adapter.PRESENT
        await self._asked(self._llm.update_weight_version(str(update.version)))
        return await self._serve(update.manifest)

    async def _loaded(self, update: WeightUpdate, loading: Coroutine[Any, Any, Any]) -> None:
        from rollout.engines.vllm_process import CallFailed

        try:
            await loading
        except CallFailed as error:
            raise WeightMismatch(f"{error}; version {update.version} was not loaded") from error

    # The steps of a sync, one by one: vLLM's native transfers (vllm_native.py) drive them from the learner.

    async def open_transfer(self, init_info: dict[str, Any]) -> None:
        """Join a group of engines that receive together; init_info: `vllm_weights._Init`. Raises CallFailed."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._done(self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info)))

    async def begin_update(self, manifest: WeightManifest) -> None:
        """Check the tensors' names, then pause generation with its requests kept. WeightMismatch before the pause."""
        manifest.require_names(self._weight_names, self.name)
        if self._updating:  # given up by the sender
            await self._asked(self._llm.finish_weight_update())
        else:
            await self._pause()
        self._updating = True
        await self._asked(self._llm.start_weight_update())

    async def receive(self, update_info: Any) -> None:
        """Load tensors; a version may come in several parts. An error leaves the engine paused. Raises CallFailed."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._done(self._llm.update_weights(WeightTransferUpdateRequest(update_info)))

    async def finish_update(self, manifest: WeightManifest) -> SyncReport:
        """Resume generation with the new version and verify it by the probe. Raises WeightMismatch."""
        await self._finish(manifest.version)
        return await self._serve(manifest)

    async def _finish(self, version: int) -> None:
        self._updating = False
        await self._done(self._llm.finish_weight_update())
        await self._asked(self._llm.update_weight_version(str(version)))

    async def _done(self, call: Coroutine[Any, Any, Any]) -> None:
        """Await a call of an update. Raises CallFailed with the first failure of vLLM's workers."""
        from rollout.engines.vllm_process import CallFailed

        await self._asked(call)
        if failed := next(filter(None, await self._asked(self._llm.collective_rpc("update_failure"))), ""):
            raise CallFailed(f"{self.name}: {failed}")

    async def _pause(self) -> None:
        self._paused_at = time.perf_counter()
        await self._asked(self._llm.pause_generation(mode="keep", clear_cache=False))

    async def _serve(self, manifest: WeightManifest) -> SyncReport:
        self.version = int(await self._asked(self._llm.get_weight_version()))
        self._asleep = False
        await self._asked(self._llm.resume_generation())
        stalled = time.perf_counter() - self._paused_at
        logprobs = await self.score(manifest.probe.token_ids)
        difference = manifest.probe.check(self.name, self.version, logprobs, self._settings.coarseness)
        seconds = time.perf_counter() - self._paused_at
        return SyncReport(self.name, self.version, len(manifest.tensors), difference, seconds, stalled)

    async def adopt_loaded(self, version: int) -> None:
        """Give the loaded weights this version number, to evaluate a checkpoint. Raises WeightsNotFinite."""
        require_finite(self.name, await self.score(FINITE_PROBE))
        await self._asked(self._llm.update_weight_version(str(version)))
        self.version = version

    async def sleep(self, level: SleepLevel) -> None:
        """Pause vLLM's scheduler, empty its caches and unmap its memory: its sleep mode."""
        self._asleep = True
        await self._asked(self._llm.sleep(level, mode="abort"))

    async def wake(self) -> None:
        """Map memory for weights and KV cache again; requests are refused until a sync."""
        await self._asked(self._llm.wake_up())

    async def ping(self) -> None:
        """Round trip to vLLM's core and its workers, which answer between two steps."""
        from rollout.engines.vllm_process import CallFailed

        try:
            await self._core.answer(self._llm.collective_rpc("answer"))
        except CallFailed as error:
            raise EngineDied(f"{self.name}: vLLM's workers do not answer its engine core: {error}") from error

    async def close(self) -> None:
        """End vLLM's processes at once; requests under way fail with EngineDied."""
        from vllm.v1.engine.exceptions import EngineDeadError

        self._core.close()
        # vLLM would report the end of its core as an error.
        if self._llm.output_handler is not None:
            self._llm.output_handler.cancel()
            self._llm.output_processor.propagate_error(EngineDeadError())
        # No grace period: a worker on CPU never stops by itself, and vLLM would kill it after 5 s.
        await asyncio.to_thread(self._llm.shutdown, 0.0)
        # vLLM calls it again, perhaps in the interpreter's exit.
        self._llm.shutdown = lambda timeout=None: None

    async def _asked(self, call: Coroutine[Any, Any, T]) -> T:
        from rollout.engines.vllm_process import CallFailed

        try:
            return await self._core.answer(call)
        except CallFailed:
            # vLLM's errors of a failed call and of a dead worker look alike.
            await self.ping()
            raise

    def _lora(self, adapter: str | None) -> Any:
        """The LoRA request of a prompt; the policy's without a name."""
        if adapter is None:
            return self._adapter
        if adapter not in self._beside:
            have = ", ".join(self._beside) or "none"
            raise ValueError(f"{self.name} serves no adapter {adapter!r}; it was started with: {have}")
        return self._beside[adapter]
