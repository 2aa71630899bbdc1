"""The errors that a user's mistake raises, wherever it is found; each message is one line."""

from __future__ import annotations


def mistakes() -> tuple[type[Exception], ...]:
    """Their types. Imported when one is caught, so that `manta --help` does not wait for them."""
    from deploy.config.config_errors import ConfigError
    from envs.registry import EnvironmentUnknown
    from learner.model.loading import ModelError
    from learner.training.checkpoint import CheckpointError
    from rollout.buffer.history import HistoryError
    from rollout.buffer.ledger_checks import LedgerError
    from rollout.buffer.segments import CorruptSegment
    from rollout.chat.chat import ChatError
    from rollout.wire.model_folder import ModelDamaged
    from rollout.wire.schema import SchemaError

    stored = CheckpointError, HistoryError, LedgerError, CorruptSegment, SchemaError
    return ConfigError, EnvironmentUnknown, ModelError, ModelDamaged, ChatError, *stored
