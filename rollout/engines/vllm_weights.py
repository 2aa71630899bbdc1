"""Weight transfer backend that receives versions in vLLM's worker process, from memory or by vLLM's own transfers.

vLLM performs a weight update through a `WeightTransferEngine`, one for the life of an engine. Manta's opens a `Handle`
(shared memory or Ray's object store) and has each process load its share of the tensors from there. On GPUs it also
receives by vLLM's own backends (nccl, ipc), through one made for each group of engines: an engine that joins or comes
back is given its version by a handle, and the next one by the group. The module is named as `worker_extension_cls`, so
that vLLM imports it in the worker process, which registers the backend there.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rollout.engines.vllm_proof import LayerProof
from rollout.engines.vllm_shares import PinnedChunks, ShareCopies
from rollout.wire.weights import ByteArray, TensorSpec, WeightMismatch, WeightUpdate

BACKEND = "manta"

logger = logging.getLogger(__name__)


class WorkerExtension:
    """Mixin of vLLM's worker; importing this module registers the backend in the worker's process."""

    def answer(self) -> None:
        """Answer a ping."""

    def copied_bytes(self) -> int:
        """Bytes of published tensors that this process copied for the last version."""
        copied: int = self.weight_transfer_engine.copied_bytes  # type: ignore[attr-defined]  # of vLLM's worker
        return copied

    def update_failure(self) -> str:
        """Why this process did not load the version under way; empty if it did."""
        failure: str = self.weight_transfer_engine.failure  # type: ignore[attr-defined]
        return failure


@dataclass
class _Init(WeightTransferInitInfo):
    """The group of one of vLLM's own backends."""

    native: str  # name of the backend
    info: dict[str, Any] = field(default_factory=dict)  # its own, for this engine
    seconds: float = 0.0  # a transfer takes at most


@dataclass
class _Update(WeightTransferUpdateInfo):
    update: dict[str, Any]  # WeightUpdate.to_plain()


def as_torch(spec: TensorSpec, array: ByteArray) -> torch.Tensor:
    """View the bytes as a tensor, without a copy; it must not be written to."""
    with warnings.catch_warnings():  # torch has no read-only tensors and warns about every mapped buffer
        warnings.simplefilter("ignore", UserWarning)
        flat = torch.frombuffer(array.data, dtype=torch.uint8)
    return flat.view(getattr(torch, spec.dtype)).view(spec.shape)


class HandleTransfer(WeightTransferEngine[_Init, _Update]):
    """Loads a version from its handle by vLLM's layerwise reload, which repeats the layout changes of loading."""

    init_info_cls = _Init
    update_info_cls = _Update

    def __init__(self, *vllms: Any) -> None:
        super().__init__(*vllms)
        self.copied_bytes = 0
        self.failure = ""
        self._chunks = PinnedChunks()
        self._native: WeightTransferEngine[Any, Any] | None = None
        self._native_seconds = 0.0

    def init_transfer_engine(self, init_info: _Init) -> None:
        """Join a group of one of vLLM's own transfers, in place of the one before."""
        self.failure = ""
        self._attempt(self._join, init_info)

    def _join(self, init_info: _Init) -> None:
        self.shutdown()
        config = WeightTransferConfig(backend=init_info.native)
        made = WeightTransferEngineFactory.create_engine(config, self.vllm_config, self.device, self.model)
        made.init_transfer_engine(made.parse_init_info(init_info.info))
        self._native, self._native_seconds = made, init_info.seconds

    def start_weight_update(self) -> None:
        self.failure, self._from_native = "", False
        self._proof, self._version = LayerProof(self.model), -1
        self._copies = ShareCopies(self._proof.copied, self._chunks)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class calls an accelerator's synchronize, which fails on CPUs.
        if not self.failure:
            receive = self._receive_handle if "update" in update_info else self._receive_native
            self._attempt(receive, update_info)

    def _attempt(self, work: Callable[..., None], *given: Any) -> None:
        """Keep an error for `update_failure` instead of raising it; after one nothing more is received.

        Of processes that raise, vLLM hears the first only, and takes the others' errors for answers to its next calls.
        """
        try:
            work(*given)
            if self.device.type != "cpu":
                torch.accelerator.synchronize()
        except Exception as error:  # any: the engine tells it
            logger.exception("a weight update failed")
            self.failure = self.failure or str(error).strip() or type(error).__name__

    def _receive_native(self, update_info: dict[str, Any]) -> None:
        native, late = self._native, threading.Event()
        if native is None:
            raise RuntimeError("this engine is in no group of a native transfer")
        self._from_native = True

        def let_go() -> None:
            late.set()
            native.shutdown()

        # Where a process of the group has died, the others would wait for it for ever.
        timer = threading.Timer(self._native_seconds, let_go)
        timer.daemon = True
        timer.start()
        try:
            native.receive_weights(native.parse_update_info(update_info))
            if self.device.type != "cpu":
                torch.accelerator.synchronize()
        finally:
            timer.cancel()
            if late.is_set():  # whatever came of it
                raise TimeoutError(f"the transfer did not end within {self._native_seconds:g} s")

    def _receive_handle(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: _Update) -> None:
        update = WeightUpdate.from_plain(update_info.update)
        self._version = update.version
        with self._copies:
            loaded = self.model.load_weights(self._mapped(update))
        if not loaded:
            raise WeightMismatch(f"version {update.version}: the model has loaded no tensor")

    def _mapped(self, update: WeightUpdate) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors where they lie: each of vLLM's loaders copies its layer's share."""
        for spec, array in update.tensors():
            tensor = self._copies.publish(spec.name, as_torch(spec, array))
            self._proof.see(spec.name, tensor)
            yield spec.name, tensor

    def finish_weight_update(self) -> None:
        """End the update; after a failure it only leaves the model ready for another one."""
        self._attempt(self._finish)

    def _finish(self) -> None:
        with self._copies:  # layers that vLLM pads are loaded now
            if self._from_native and self._native is not None:
                self._native.finish_weight_update()  # the same, and lets go of the sender's buffer
            else:
                finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            self._repack_tied_head()
            self._repack_experts()
        if not self.failure:
            self._proof.check(self._version)
        self.copied_bytes = self._copies.copied_bytes
        del self._proof, self._copies  # and with them the version's memory

    def _repack_tied_head(self) -> None:
        # On a CPU the head keeps a packed copy of its weight. The reload refreshes packed copies layer by layer but
        # skips a tied head, which would continue to sample from the old embeddings. The tensors say what is tied: vLLM
        # changes its configuration to untied where the checkpoint's files hold the head too.
        modules = list(self.model.modules())
        embeddings = [module.weight for module in modules if type(module) is VocabParallelEmbedding]
        for module in modules:
            if isinstance(module, ParallelLMHead) and any(module.weight is each for each in embeddings):
                module.quant_method.process_weights_after_loading(module)

    def _repack_experts(self) -> None:
        # Experts on a CPU are packed when they are first loaded, but not by a reload, which leaves them as published.
        for module in self.model.modules():
            if isinstance(module, RoutedExperts) and isinstance(
                module.quant_method, UnquantizedFusedMoEMethod
            ):
                kernel = module.quant_method.moe_kernel
                assert kernel is not None, "made when the model was loaded"
                kernel.fused_experts.process_weights_after_loading(module)

    def shutdown(self) -> None:
        """Leave the group of the native transfer."""
        if self._native is not None:
            self._native.shutdown()
            self._native = None


WeightTransferEngineFactory.register_engine(BACKEND, HandleTransfer)
