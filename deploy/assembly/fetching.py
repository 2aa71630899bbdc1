"""The folder of a model, wherever it comes from."""

from __future__ import annotations

from deploy.config.config_errors import ConfigError
from rollout.wire.model_folder import ModelDamaged, ModelMissing


def fetch(named: str, whole: bool = False, download: bool = True) -> str:
    """The folder of a model on this machine, fetched first if it is not here. ConfigError, one line, if it cannot be.

    whole: require all files of a folder too, as of everything that is fetched. download: from the hub; False: only what
    is in its cache.
    """
    # The hub's client, and readers of weights: not every process needs them.
    from learner.model.completeness import require_whole
    from learner.model.source import local_model

    try:
        folder = local_model(named, download)
        if whole:
            require_whole(folder, named)
    except (ModelMissing, ModelDamaged) as error:
        raise ConfigError(str(error)) from error
    return str(folder)
