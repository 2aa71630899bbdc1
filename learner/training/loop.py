"""The learner's side of the ring, one verb at a time; whoever supervises the run says when.

    begin_stage      take the data of a stage, of those before version 0
    advance_stage    make steps of it
    train            take a step's groups and learn from them: the version is one higher
    publish_weights  put the version where engines can load it       engines load and prove it
    unpin_weights    let go of what was put                          buffer.release: new groups may start
    save             copy what a checkpoint holds; it is written while the next step is made
    landed           wait until it is on disk
    copy             what `save` copies, for a `save` that comes when the state is away
    offload, onload  take the state to host memory while engines have the device, and back

Of several ranks this is rank 0's: it alone is asked, and tells the others (follower.py) what to do with it, one thing
at a time. So all do the same in the same order.

A verb whose answer was lost may be said again: `train` names its step, `publish_weights` gives the same version again
at any time (an engine that joins late), `save` and `landed` do nothing for a version that has landed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from learner.data.batch_checks import MOST_REFUSED, BatchRefused, GroupsRefused
from learner.parallel.ranks import RankLost, touching
from learner.training.checkpoint_writing import Saving
from learner.training.device_state import DeviceState
from learner.training.learner import Learner
from learner.training.publish import Publisher, Snapshot, Staging, take_snapshot
from rollout.wire.metrics import Row, joined
from rollout.wire.own_part import OwnPartError
from rollout.wire.partition import Partition
from rollout.wire.policies import POLICY
from rollout.wire.schema import decode
from rollout.wire.trajectory import DropReason
from rollout.wire.weights import ByteArray, Delta, Handle, SyncReport, TransferStuck, WeightUpdate

logger = logging.getLogger(__name__)

_LAST_WORDS_SECONDS = 10.0  # from a rank's failure until that is told
# Puts bytes where engines can load them; what it gives beside the handle is kept until the version is withdrawn.
Place = Callable[[Sequence[ByteArray]], tuple[Handle, Any]]
# Tells all other ranks one of `Follower`'s verbs and its words; gives what will be their answers, from rank 1 on.
Tell = Callable[..., Sequence[Awaitable[Any]]]
Published = Callable[[WeightUpdate], object]
T = TypeVar("T")


class Source(Protocol):
    """Where groups come from; the replay buffer, near or far."""

    async def take(self, version: int, timeout_s: float, share: Partition) -> list[pa.RecordBatch]: ...
    async def discard(self, version: int, reason: DropReason) -> None: ...
    async def checkpointed(self, version: int) -> None: ...
    async def counts(self) -> dict[str, int]: ...


@dataclass(slots=True)
class _Offer:
    update: WeightUpdate
    kept: Any  # what keeps its bytes
    pins: int = 0  # callers that were offered it and have not let go


class LearnerLoop:
    """Joins a `Learner` to a source of groups and a place for weights. All calls come from one event loop.

    `native` is for vLLM's own transfers, which send the live parameters and need no place. `tell` reaches other ranks.
    `policy` is the name that versions are published under. `published` is called with each before others hear of it.
    """

    def __init__(
        self,
        learner: Learner,
        source: Source,
        place: Place,
        engine_dtype: str,
        take_seconds: float,
        keep_checkpoints: int = 2,
        native: Publisher | None = None,
        tell: Tell = lambda *verb: (),
        policy: str = POLICY,
        published: Published | None = None,
    ) -> None:
        self._learner = learner
        self._state = DeviceState(learner)
        self._source = source
        self._place = place
        self._engine_dtype = engine_dtype
        self._take_seconds = take_seconds
        self._keep = keep_checkpoints
        self._native = native
        self._policy = policy
        self._published = published
        self._tell = tell
        self._waited: tuple[int, Row] = (-1, {})  # a step, and what it has waited for so far
        self._last: Row | None = None  # of the step that made the present version
        self._copied: tuple[tuple[Path, int], Saving] | None = None  # of a checkpoint that is not on disk yet
        self._saved: tuple[Path, int] | None = None  # the last checkpoint: the same is not written twice
        self._landing: asyncio.Task[None] | None = None  # it is on its way to disk, or arrived unheard
        self._torn = False  # a step began and did not end: the parameters are no version's
        # Three things have one user at a time: the next step, the staging buffer, and the parameters (their lock is
        # taken last, and only while they are read or written).
        self._training, self._offering, self._weights = asyncio.Lock(), asyncio.Lock(), asyncio.Lock()
        self._saving = asyncio.Lock()
        self._staging = Staging()
        self._snapshot: Snapshot | None = None  # what the staging buffer holds
        self._placed: _Offer | None = None  # of that snapshot
        self._offers: list[_Offer] = []  # it, and earlier ones that engines may still be loading

    @property
    def version(self) -> int:
        return self._learner.version

    async def train(self, step: int, others: bool = True) -> Row:
        """Learner step number `step`: the version becomes `step`. Returns its metrics; asked again, the same ones.

        A batch that can not be learned from is set aside, and the step takes another one; with `others=False`, while
        nobody plays any, GroupsRefused is raised instead. Raises ValueError where the learner stands elsewhere,
        BatchRefused when other batches do not help, and what the source's take raises.
        """
        async with self._training:
            if self.version == step and self._last is not None:
                return dict(self._last)
            if self.version + 1 != step:
                raise ValueError(f"step {step} was asked of a learner that stands at version {self.version}")
            if self._waited[0] != step:
                self._waited = step, {"wait_s": 0.0, "nonfinite_batches": 0.0}
            waited = self._waited[1]
            while True:
                began = time.perf_counter()
                # It waits for the step's groups to come together; the others' shares are there when it has its own.
                batches = await self._source.take(self.version, self._take_seconds, self._learner.ranks.share)
                await asyncio.gather(*self._tell("take", self.version))
                waited["wait_s"] += time.perf_counter() - began
                try:
                    async with self._weights:
                        return await self._together(("step", step), self._step, batches, waited)
                except BatchRefused as error:
                    logger.warning("step %d: %s; its groups are set aside and others taken", step, error)
                    waited["nonfinite_batches"] += 1
                    again = waited["nonfinite_batches"] <= MOST_REFUSED
                    if again and not others:
                        raise GroupsRefused(f"step {step}: {error}") from error
                    await self._source.discard(self.version, DropReason.NONFINITE)
                    if not again:
                        raise BatchRefused(
                            f"step {step}: none of {MOST_REFUSED + 1} batches in a row could be learned from; last: "
                            f"{error}"
                        ) from error

    async def publish_weights(self, delta: bool = False) -> WeightUpdate:
        """The present version, put where engines can load it until each call was answered by an `unpin_weights`.

        delta: put its difference to the version before there too, unless that is no shorter.

        Before the stages that is version -1, the model as they find it. While the next step is trained, or a stage is
        made, a version that was offered before is offered again out of the staging buffer; one that was not waits for
        the step's end. The buffer is written again by the first offer of the next version.
        """
        async with self._offering:
            version = self._learner.published_version
            if self._snapshot is None or self._snapshot.manifest.version != version:
                if self._learner.stages.open:
                    raise RuntimeError(
                        "a stage is under way: the weights are no version, and are offered to nobody"
                    )
                # The version before may be loaded still: the step after it is made meanwhile. None before that is.
                self._placed, self._offers = None, self._offers[-1:]
                self._snapshot = await self._take_snapshot(self._staging, delta)
            if self._placed is None:
                self._placed = _Offer(*await to_its_end(self._put, self._snapshot))
                if self._published is not None and version >= 0:
                    await to_its_end(self._published, self._placed.update)
                self._offers.append(self._placed)
            self._placed.pins += 1
            return self._placed.update

    async def unpin_weights(self, version: int, handle: Handle) -> None:
        """One caller's engines hold this offer: the last lets go of it. The staging buffer keeps its bytes.

        Calls may overtake each other, as those of an asyncio actor do: a later caller's offer outlives this call.
        """
        async with self._offering:
            for offer in self._offers:
                if (offer.update.version, offer.update.handle) == (version, handle):
                    offer.pins -= 1
            self._offers = [offer for offer in self._offers if offer.pins]
            if self._placed is not None and not self._placed.pins:
                self._placed = None

    async def publish_native(self, workers: Mapping[str, Any]) -> list[SyncReport]:
        """Send the present version by vLLM's own transfer; returns when these engines have proved that they hold it.

        workers: handles of their actors, by name. It is gathered layer by layer while it is sent: the other ranks take
        part. Raises TransferFailed, after which the version can be published otherwise, and RankLost.
        """
        if self._native is None:
            raise RuntimeError(
                "this learner was given no native transfer: weights.transfer is 'object_store'"
            )
        async with self._offering:
            snapshot = await self._take_snapshot(None)
            async with self._weights:
                others = [asyncio.ensure_future(answer) for answer in self._tell("send")]
                try:
                    return list(await self._native.publish(snapshot, workers))
                except TransferStuck as error:
                    others = []  # they wait for this rank
                    raise RankLost(str(error)) from error
                finally:
                    await asyncio.gather(*others)

    async def begin_stage(self, index: int, batches: Sequence[pa.RecordBatch]) -> tuple[int, int]:
        """Begin a stage on these groups; returns the steps that are made and how many there are in all."""
        async with self._weights:
            words = ("begin_stage", index, batches)
            return await self._together(words, begin_stage, self._learner, index, batches)

    async def advance_stage(self, steps: int) -> list[Row]:
        """Make up to `steps` steps of the stage; fewer at its end."""
        async with self._weights:
            self._saved = self._copied = None
            return await self._together(("advance_stage", steps), self._learner.advance_stage, steps)

    async def save(self, run_folder: Path) -> None:
        """Begin a checkpoint once the one before has landed: returns when all that it holds is copied.

        Raises DiskFull where the one before found no room.
        """
        async with self._saving:
            await self._arrival()
            version, staged = self.version, self._learner.stages.open
            if self._saved == (run_folder, version):
                return
            saving = await self._copy(run_folder)
            await asyncio.gather(*self._tell("land"))
            self._saved = run_folder, version
            self._landing = asyncio.create_task(self._land(saving, None if staged else version))

    async def copy(self, run_folder: Path) -> None:
        """Copy what a checkpoint of this version holds once the one before is written; `save` then takes this."""
        async with self._saving:
            if self._saved == (run_folder, self.version):
                return
            if self._landing is not None:  # whether it found room is for `save` to say
                await asyncio.wait([self._landing])
            await self._copy(run_folder)

    async def _copy(self, run_folder: Path) -> Saving:
        """The copy of this version, which is kept until it is on disk."""
        if self._copied is None or self._copied[0] != (run_folder, self.version):
            # "issued" is where the task stream stands: group ids are its positions.
            cursor = await self._source.counts()
            async with self._weights:
                self._require_whole()
                begin = partial(self._learner.begin_save, run_folder, cursor, self._keep)
                saving = await self._together(("copy", run_folder), begin)
                self._copied = (run_folder, self.version), saving
        return self._copied[1]

    async def offload(self) -> int:
        """Take the learner's state to host memory, so that engines may have its device; returns rank 0's bytes.

        Until `onload` it gives out versions and checkpoints only that were published or copied before.
        """
        async with self._weights:
            return await self._together(("offload",), self._state.offload)

    async def onload(self) -> int:
        """Bring the state back; returns rank 0's bytes."""
        async with self._weights:
            return await self._together(("onload",), self._state.onload)

    async def landed(self) -> None:
        """Wait until the last checkpoint is on disk and the groups it contains are trained for good. Raises DiskFull.

        One of a stage contains none.
        """
        async with self._saving:
            await self._arrival()

    async def _land(self, saving: Saving, version: int | None) -> None:
        try:
            await to_its_end(touching, self._learner.ranks, saving.land)
            if version is not None:
                await self._source.checkpointed(version)
            self._copied = None
        except BaseException:
            self._saved = None
            raise

    async def _arrival(self) -> None:
        if self._landing is not None:
            try:
                await asyncio.shield(self._landing)
            finally:
                if self._landing.done():
                    self._landing = None

    def _put(self, snapshot: Snapshot) -> tuple[WeightUpdate, Any]:
        handle, whole = self._place(snapshot.arrays)
        if not snapshot.differences:
            return WeightUpdate(snapshot.manifest, handle), whole
        shorter, alive = self._place(snapshot.differences)
        delta = Delta(snapshot.base, shorter, tuple(each.nbytes for each in snapshot.differences))
        return WeightUpdate(snapshot.manifest, handle, delta), (whole, alive)

    def _step(self, batches: list[pa.RecordBatch], waited: Row) -> Row:
        self._require_whole()
        began = time.perf_counter()
        groups = [decode(batch) for batch in batches]
        self._torn = True
        try:
            row = self._learner.step(groups)
        except BatchRefused:
            self._torn = False  # it has changed nothing
            raise
        self._torn = False
        train_s = time.perf_counter() - began
        speed = {"train_s": train_s, "learner_tokens_per_s": row["tokens_processed"] / train_s}
        self._last = joined(row, waited, speed, {"step": self.version})
        return dict(self._last)

    def _require_whole(self) -> None:
        if self._torn:
            raise RuntimeError(
                f"the learner's step after version {self.version} failed on its way: start it again from a checkpoint"
            )
        self._state.require_here()

    async def _take_snapshot(self, staging: Staging | None, delta: bool = False) -> Snapshot:
        """Without a staging buffer the snapshot has no bytes."""
        async with self._weights:
            self._require_whole()
            learner, with_bytes = self._learner, staging is not None
            words = learner.policy, learner.published_version, self._engine_dtype, with_bytes, staging, delta
            verb = "snapshot" if with_bytes else "manifest"
            snapshot = await self._together((verb,), take_snapshot, *words)
        return replace(snapshot, manifest=replace(snapshot.manifest, policy=self._policy))

    async def _together(self, words: tuple[Any, ...], function: Callable[..., T], *args: Any) -> T:
        """Tell the other ranks these words while this one calls the function; returns when all have ended.

        A rank that fails leaves others waiting for it, this one perhaps: they are given a moment to say what they know.
        """
        own = asyncio.ensure_future(to_its_end(touching, self._learner.ranks, function, *args))
        everyone = [own, *(asyncio.ensure_future(answer) for answer in self._tell(*words))]
        try:
            await asyncio.wait(everyone, return_when=asyncio.FIRST_EXCEPTION)
            await asyncio.wait(everyone, timeout=_LAST_WORDS_SECONDS)
        except asyncio.CancelledError:
            await asyncio.wait(everyone)
            raise
        self._torn = self._torn or not own.done()
        failed = [error for ended in everyone if ended.done() and (error := ended.exception())]
        mistakes = [
            error for error in failed if isinstance(error, OwnPartError)
        ]  # which another start would repeat
        lost = [str(error) for error in failed if isinstance(error, RankLost)]
        if lost and not mistakes:
            raise RankLost("; ".join(lost))
        if failed:
            raise (mistakes or failed)[0]
        return own.result()


def begin_stage(learner: Learner, index: int, batches: Sequence[pa.RecordBatch]) -> tuple[int, int]:
    """What every rank does at the beginning of a stage."""
    return learner.begin_stage(index, [decode(batch) for batch in batches])


def sync_metrics(reports: Sequence[SyncReport]) -> Row:
    """What the engines' acknowledgements of one version say together."""
    return {
        "sync_stall_ms": 1e3 * max((report.seconds_stalled for report in reports), default=0.0),
        "probe_difference": max((report.probe_difference for report in reports), default=0.0),
    }


async def to_its_end(function: Callable[..., T], *args: Any) -> T:
    """Run in a thread. A thread can not be stopped: whoever is cancelled waits for it before its locks are free."""
    working = asyncio.ensure_future(asyncio.to_thread(function, *args))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait([working])
        raise
