"""Which policy a version belongs to."""

from __future__ import annotations

import pytest

from rollout.wire.weights import Handle, Probe, WeightManifest, WeightMismatch, WeightUpdate


def test_a_version_of_another_policy_is_refused_and_both_are_named() -> None:
    manifest = WeightManifest(3, (), Probe((), (), 0.0), policy="asker")
    sent = WeightUpdate.from_plain(WeightUpdate(manifest, Handle("", "")).to_plain())
    sent.manifest.require_policy("asker", "rollout-0")
    with pytest.raises(
        WeightMismatch, match=r"rollout-0: version 3 is of policy 'asker', .* serves 'solver'"
    ):
        sent.manifest.require_policy("solver", "rollout-0")
