"""Weight transfer backend that loads published weights in vLLM's worker process.

vLLM performs a weight update through a `WeightTransferEngine`. Its own backends (nccl, ipc) need a GPU; this one opens
a `Handle` (shared memory or Ray's object store) and loads the tensors from it without a copy. The module is named as
`worker_extension_cls`, so that vLLM imports it in the worker process, which registers the backend there.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
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
from rollout.wire.weights import ByteArray, TensorSpec, WeightMismatch, WeightUpdate

BACKEND = "manta"


class WorkerExtension:
    """Mixin of vLLM's worker; importing this module registers the backend in the worker's process."""

    def answer(self) -> None:
        """Answer a ping."""


@dataclass
class _Init(WeightTransferInitInfo):
    """Empty: every update has the handle to its bytes."""


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

    def init_transfer_engine(self, init_info: _Init) -> None:
        pass

    def start_weight_update(self) -> None:
        self._proof, self._version = LayerProof(self.model), -1
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class calls an accelerator's synchronize, which fails on CPUs.
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: _Update) -> None:
        update = WeightUpdate.from_plain(update_info.update)
        self._version = update.version
        loaded = self.model.load_weights(self._on_device(update))
        if not loaded:
            raise WeightMismatch(f"version {update.version}: the model has loaded no tensor")

    def _on_device(self, update: WeightUpdate) -> Iterator[tuple[str, torch.Tensor]]:
        for spec, array in update.tensors():
            tensor = as_torch(spec, array).to(self.device)
            self._proof.see(spec.name, tensor)
            yield spec.name, tensor

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            self._repack_tied_head()
            self._repack_experts()
        self._proof.check(self._version)

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
        pass


WeightTransferEngineFactory.register_engine(BACKEND, HandleTransfer)
