"""The learner's processes and what they say to one another: N ranks take one step together, each over its share.

Whatever concerns the whole batch (counts that weigh tokens, the moments of a normalization, metrics, whether a step was
finite) is gathered as numbers and computed by every rank alike, so that all decide the same. Every rank does the same
things in the same order: a rank with fewer rows than others runs idle ones.

    rank 0     Rendezvous: a store at one address inside the cluster
    all        Ranks.join: the process group (gloo, beside it NCCL where the learner computes on GPUs) and its mesh
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rollout.wire.partition import Partition

T = TypeVar("T")


class RankLost(RuntimeError):
    """A rank died, or did not come or answer in time: the learner can only start again from its newest checkpoint."""


class Ranks:
    """A process among the learner's; as it stands, the only one."""

    def __init__(self, rank: int = 0, size: int = 1, mesh: DeviceMesh | None = None) -> None:
        self.rank, self.size, self.mesh = rank, size, mesh

    @classmethod
    def join(cls, rank: int, size: int, address: str, device: str, seconds: float) -> Ranks:
        """Meet the others at `address`, host:port of rank 0's `Rendezvous`; every later wait is `seconds` long too.

        RankLost where not all came in time.
        """
        host, _, port = address.rpartition(":")
        _use_interface_to(host)
        limit = timedelta(seconds=seconds)
        try:
            store = dist.TCPStore(host, int(port), size, is_master=False, timeout=limit)
            backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
            ranks = cls(rank, size, init_device_mesh(device, (size,)))
            ranks.gather("here")
        except RuntimeError as error:  # torch's own errors are such, and gloo's nothing more
            raise RankLost(
                f"rank {rank} of the learner did not meet the other {size - 1} at {address} within {seconds:g} s: "
                f"{str(error).splitlines()[0]}"
            ) from error
        return ranks

    @property
    def share(self) -> Partition:
        """Of a step's groups."""
        return Partition(self.rank, self.size)

    def gather(self, words: Any) -> list[Any]:
        """What every rank says, in order of rank: anything that is JSON; floats arrive as they are."""
        if self.size == 1:
            return [words]
        own = torch.frombuffer(bytearray(json.dumps(words).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(own)]))
        lengths = [int(size) for size in sizes]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(own)] = own
        said = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(said, padded)
        return [
            json.loads(text[:length].numpy().tobytes()) for text, length in zip(said, lengths, strict=True)
        ]

    def sums(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """The sum over all ranks of each number, by name; a rank may lack some."""
        said = self.gather(dict(numbers))
        names = dict.fromkeys(name for each in said for name in each)
        return {name: sum(each[name] for each in said if name in each) for name in names}

    def most(self, count: int) -> int:
        """The largest count of any rank."""
        return max(self.gather(count))


ALONE = Ranks()


def touching(ranks: Ranks, function: Callable[..., T], *args: Any) -> T:
    """What a function gives in which ranks wait for one another; RankLost where one was waited for in vain.

    torch says that in a plain RuntimeError (a socket was closed, a wait has ended), wherever in a step it happens.
    """
    try:
        return function(*args)
    except RuntimeError as error:
        ours = type(error) is RuntimeError or isinstance(error, dist.DistError)
        if ranks.size == 1 or not ours:
            raise
        raise RankLost(
            f"rank {ranks.rank} of the learner lost touch with the others: {str(error).splitlines()[0]}"
        ) from error


class Rendezvous:
    """Where ranks find one another: a store on a free port of one of this host's addresses, and of no other."""

    def __init__(self, host: str, ranks: int, seconds: float) -> None:
        listener = socket.create_server((host, 0))
        self.address = f"{host}:{listener.getsockname()[1]}"
        # The store takes the socket over and closes it at its end.
        self._store = dist.TCPStore(
            host,
            listener.getsockname()[1],
            ranks,
            is_master=True,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )


def _use_interface_to(host: str) -> None:
    """Have gloo and NCCL talk over the network that the rendezvous is on, unless the user has said which."""
    own = _interface_of(_own_address(host))
    if own is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", own)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", own)


def _own_address(host: str) -> str:
    """The address of this host on the way there; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((host, 1))
        return str(way.getsockname()[0])


def _interface_of(address: str) -> str | None:
    for name, addresses in psutil.net_if_addrs().items():
        if address in (each.address for each in addresses):
            return name
    return None
