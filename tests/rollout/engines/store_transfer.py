"""A native transfer without GPUs, for vLLM's workers: tensors go through the store that a group meets at."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from rollout.wire.weights import TensorSpec

NAME = "store"
_POLL_SECONDS = 0.01


class StoreTransfer(NCCLWeightTransferEngine):
    """vLLM's nccl engine, but for the group and for how a tensor comes."""

    def init_transfer_engine(self, init_info: Any) -> None:
        rank = self.parallel_config.rank + init_info.rank_offset
        self._group = StatelessProcessGroup.create(
            init_info.master_address, init_info.master_port, rank, init_info.world_size, store_timeout=60
        )
        self._left = threading.Event()

    def receive_weights(self, update_info: Any) -> None:
        for number, name in enumerate(update_info.names):
            while not self._group.store.check([_ready(number)]):
                if self._left.wait(_POLL_SECONDS):
                    raise RuntimeError("the group was left")
            self.model.load_weights([(name, self._group.broadcast_obj(None, src=0))])

    def shutdown(self) -> None:
        self._left.set()


def install(worker: Any) -> None:
    """Runs in vLLM's worker: let the transfer be found by its name."""
    WeightTransferEngineFactory._registry[NAME] = lambda: StoreTransfer


class Sender:
    """Rank 0 of a group with the workers of one engine; joined by `join`, in a thread beside theirs."""

    def __init__(self, port: int, workers: int) -> None:
        self.info = {
            "native": NAME,
            "info": {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1},
            "seconds": 30.0,
        }
        self._world = self.info["info"]["world_size"] = 1 + workers  # type: ignore[index]
        self._port = port

    def join(self) -> None:
        self._group = StatelessProcessGroup.create("127.0.0.1", self._port, 0, self._world, store_timeout=60)

    def send(self, tensors: Iterable[torch.Tensor]) -> None:
        for number, tensor in enumerate(tensors):
            self._group.broadcast_obj(tensor, src=0)
            self._group.store.set(_ready(number), b"1")


def described(specs: Sequence[TensorSpec]) -> dict[str, Any]:
    """What vLLM's nccl trainer says of the tensors before it sends them."""
    return {
        "names": [spec.name for spec in specs],
        "dtype_names": [spec.dtype for spec in specs],
        "shapes": [list(spec.shape) for spec in specs],
    }


def _ready(number: int) -> str:
    return f"ready-{number}"
