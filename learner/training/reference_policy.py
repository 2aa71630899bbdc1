"""The policy that reinforcement learning began with, kept to measure how far the learner has gone from it.

RUN/reference/    its weights in Hugging Face format, written once, with the checkpoint of version 0

Of a policy that trains an adapter only the adapter is kept: the base is the learner's own, and does not change.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from torch import Tensor

from learner.model.policy import Policy
from learner.model.shared_files import write_together
from learner.parallel.ranks import ALONE, Ranks
from learner.settings import ModelSettings
from learner.training.checkpoint import CheckpointError

_FOLDER = "reference"


def frozen(policy: Policy) -> Policy:
    """The policy, which from here on only scores: its weights get no gradients."""
    policy.model.requires_grad_(False)
    return policy


class Reference:
    """Frozen weights; nothing is loaded before they are asked for."""

    def __init__(self, settings: ModelSettings, ranks: Ranks = ALONE) -> None:
        self._settings = settings.beside
        self._ranks = ranks
        self._path: Path | None = None
        self._policy: Policy | None = None
        self._adapter: dict[str, Tensor] | None = None

    @contextmanager
    def beside(self, policy: Policy) -> Iterator[Policy]:
        """The frozen model, while this lasts; a learner that trains an adapter lends its own model for that time.

        CheckpointError where a run was taken up whose reference is gone.
        """
        if policy.adapter is None:
            yield self._whole()
            return
        if self._adapter is None:
            try:
                self._adapter = policy.adapter.read(self._found())
            except ValueError as error:
                raise CheckpointError(f"the reference policy is broken: {error}") from error
        routing = nullcontext() if policy.replay is None else policy.replay.off()
        with policy.adapter.holding(self._adapter), routing:
            yield policy

    def copy(self, policy: Policy) -> None:
        """Take the weights of a policy that stands at version 0."""
        if policy.adapter is not None:
            self._adapter = policy.adapter.copy()
        elif self._policy is None:
            self._policy = frozen(policy.twin())

    def held(self) -> list[Tensor]:
        """Its weights, which lie on the device; those of an adapter are few and stay."""
        return [] if self._policy is None else list(self._policy.model.parameters())

    def keep(self, run: Path, policy: Policy) -> None:
        """Write the weights of version 0 into the run, whole or not at all. A collective call."""
        partial = run / f".partial-{_FOLDER}"
        lead = not self._ranks.rank
        if lead:
            shutil.rmtree(partial, ignore_errors=True)
        if policy.adapter is None:
            policy.save(partial)
        else:
            write_together({"": policy.adapter.folder(lead)}, partial, self._ranks)
        if lead:
            shutil.rmtree(run / _FOLDER, ignore_errors=True)
            partial.rename(run / _FOLDER)

    def find(self, run: Path) -> None:
        """The run is taken up: its reference is the one it was begun with."""
        self._path, self._policy, self._adapter = run / _FOLDER, None, None

    def _whole(self) -> Policy:
        if self._policy is None:
            stored = self._settings.model_copy(update={"path": str(self._found())})
            self._policy = frozen(Policy(stored, self._ranks))
        return self._policy

    def _found(self) -> Path:
        if self._path is None or not self._path.is_dir():
            raise CheckpointError(
                f"the reference policy is missing: {self._path} was written with version 0 and is needed for kl"
            )
        return self._path
