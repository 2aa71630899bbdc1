"""Ranks: the learner's processes, which take every step together, each over its share of the groups.

Numbers of the whole batch (counts for token weights, moments of a normalization, metrics, whether a step was finite)
are gathered, and every rank computes the same result from them. All ranks make the same calls in the same order: a rank
with fewer rows runs idle ones.

    rank 0     Rendezvous: a store at one address inside the cluster
    all        Ranks.join: the process group (gloo, and NCCL for a learner on GPUs) and its mesh
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

from learner.parallel.context import ContextGroup
from rollout.wire.partition import Partition

T = TypeVar("T")


class RankLost(RuntimeError):
    """A rank died, or did not join or answer in time: the learner has to restart from its newest checkpoint."""


class Ranks:
    """One of the learner's processes; the default is the only one.

    mesh: the ranks that parameters are sharded over, all or as many as a node has; copies: the ranks that hold the same
    part as this one, None where no other does. group: through which they gather; None: the default one. aside: another,
    for a thread beside the learner's own. context: the neighbors that compute the same rows, which have one share.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        mesh: DeviceMesh | None = None,
        group: dist.ProcessGroup | None = None,
        aside: dist.ProcessGroup | None = None,
        copies: dist.ProcessGroup | None = None,
        context: ContextGroup | None = None,
    ) -> None:
        self.rank, self.size, self.mesh, self.copies = rank, size, mesh, copies
        self.context = context or ContextGroup()
        self._group, self._aside = group, aside

    @property
    def aside(self) -> Ranks:
        """The same ranks for a thread that gathers while another computes; it has no mesh."""
        return Ranks(self.rank, self.size, group=self._aside)

    @classmethod
    def join(
        cls,
        rank: int,
        size: int,
        address: str,
        device: str,
        seconds: float,
        sharded_over: int | None = None,
        context: int = 1,
    ) -> Ranks:
        """Join the others at `address`, host:port of rank 0's `Rendezvous`. seconds: limit of this and every later
        wait. sharded_over: consecutive ranks that parameters are sharded over, a divisor of `size`; None: all.
        context: consecutive ranks that compute one row together, a divisor too.

        RankLost if not all join in time.
        """
        host, _, port = address.rpartition(":")
        _use_interface_to(host)
        limit = timedelta(seconds=seconds)
        try:
            store = dist.TCPStore(host, int(port), size, is_master=False, timeout=limit)
            backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
            aside = dist.new_group(backend="gloo", timeout=limit)
            mesh, copies = _meshes(device, size, sharded_over or size)
            neighbors = _context_group(rank, context, limit)
            ranks = cls(rank, size, mesh, aside=aside, copies=copies, context=neighbors)
            ranks.gather("here")
        except RuntimeError as error:  # the type of torch's and gloo's errors
            raise RankLost(
                f"rank {rank} of the learner did not meet the other {size - 1} at {address} within {seconds:g} s: "
                f"{str(error).splitlines()[0]}"
            ) from error
        return ranks

    @property
    def shards(self) -> int:
        """Parts that parameters are divided into."""
        return 1 if self.mesh is None else self.mesh.size()

    @property
    def share(self) -> Partition:
        """The own share of a step's groups; the ranks of a context group have the same one."""
        together = self.context.size
        return Partition(self.rank // together, self.size // together, together)

    def gather(self, words: Any, everyone: bool = False) -> list[Any]:
        """Gather a JSON value of every share, in order; floats arrive exactly. RankLost if a rank is silent.

        Ranks of a context group have the same share, and say the same of it: the first one's is taken. everyone: that
        of each rank, for what ranks find by themselves, such as a file that one cannot read.
        """
        if self.size == 1:
            return [words]
        said = touching(self, self._gather, words)
        return said if everyone else said[:: self.context.size]

    def _gather(self, words: Any) -> list[Any]:
        own = torch.frombuffer(bytearray(json.dumps(words).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(own)]), group=self._group)
        lengths = [int(size) for size in sizes]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(own)] = own
        said = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(said, padded, group=self._group)
        return [
            json.loads(text[:length].numpy().tobytes()) for text, length in zip(said, lengths, strict=True)
        ]

    def sums(self, numbers: Mapping[str, float], sliced: bool = False) -> dict[str, float]:
        """Sum each named number over all shares; a rank may lack some names.

        sliced: over all ranks; the numbers are of the own slices of rows.
        """
        said = self.gather(dict(numbers), everyone=sliced)
        names = dict.fromkeys(name for each in said for name in each)
        return {name: sum(each[name] for each in said if name in each) for name in names}

    def most(self, count: int) -> int:
        """Maximum of a count over all shares."""
        return max(self.gather(count))


ALONE = Ranks()


def _meshes(device: str, size: int, within: int) -> tuple[DeviceMesh, dist.ProcessGroup | None]:
    """The mesh of this rank's shards, and the group of those that hold the same part."""
    if within == size:
        return init_device_mesh(device, (size,)), None
    # PEFT knows by this name that a layer computes with its whole weight, however it is stored.
    both = init_device_mesh(device, (size // within, within), mesh_dim_names=("copies", "fsdp"))
    return both["fsdp"], both.get_group("copies")


def _context_group(rank: int, size: int, limit: timedelta) -> ContextGroup:
    """The neighbors that compute one row together."""
    if size == 1:
        return ContextGroup()
    own, _ = dist.new_subgroups(size, timeout=limit)
    return ContextGroup(rank % size, size, own)


def touching(ranks: Ranks, function: Callable[..., T], *args: Any) -> T:
    """Call a function with collective operations; RankLost if a rank does not answer.

    torch reports a closed socket or a timeout as a plain RuntimeError, anywhere in a step.
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
    """The store at which ranks join: on a free port of one address of this host."""

    def __init__(self, host: str, ranks: int, seconds: float) -> None:
        listener = socket.create_server((host, 0))
        self.address = f"{host}:{listener.getsockname()[1]}"
        # The store owns the socket from here on and closes it.
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
    """Set gloo's and NCCL's network interface to the rendezvous's, unless the user has set one."""
    own = _interface_of(_own_address(host))
    if own is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", own)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", own)


def _own_address(host: str) -> str:
    """Address of the own host on the route to `host`; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((host, 1))
        return str(way.getsockname()[0])


def _interface_of(address: str) -> str | None:
    for name, addresses in psutil.net_if_addrs().items():
        if address in (each.address for each in addresses):
            return name
    return None
