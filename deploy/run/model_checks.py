"""Checks of the models of a run, before it starts: their files, their configurations, their tokenizers.

Each raises an error for the user: what is wrong, where, and how to fix it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from deploy.assembly.fetching import fetch
from deploy.assembly.models import model_of
from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from deploy.config.engine_checks import require_divisible
from deploy.run import replay
from learner.model.attention import require_slices
from learner.model.lora_targets import planned
from learner.model.mixtures import require_mixture_of
from learner.model.tiny import build_tiny
from rollout.chat.end_tokens import end_tokens
from rollout.wire.model_folder import CodeRefused, companions, pretrained, write_companions


def check_model(named: str) -> str:
    """Fetch a model to this machine and require all of its files; returns its folder."""
    return fetch(named, whole=True)


def check_trainable(path: str, architecture: PretrainedConfig) -> None:
    """ConfigError for quantized weights, which cannot be trained."""
    method = getattr(architecture, "quantization_config", None)
    if method is not None:
        raise ConfigError(
            f"model {path}: its weights are quantized and cannot be trained; use the unquantized checkpoint"
        )


def check_context(path: str, context_tokens: int, architecture: PretrainedConfig) -> None:
    """Require a position of the model for every token of the context."""
    config = architecture.get_text_config()
    if not hasattr(config, "max_position_embeddings"):
        raise ConfigError(
            f"model {path}: its family {config.model_type} states no max_position_embeddings, so it is unknown whether "
            f"rollout.context_tokens={context_tokens} fits; choose a pure attention model"
        )
    if (positions := config.max_position_embeddings) < context_tokens:
        raise ConfigError(
            f"model {path} has {positions} positions, but rollout.context_tokens={context_tokens} "
            "(manta eval: --context-tokens); lower it"
        )


def check_architecture(config: RunConfig, architecture: PretrainedConfig) -> None:
    """Require a model that the parallel sizes divide, and routers if they are balanced or replayed."""
    with _of_model(config.learner.model.path):
        require_divisible(config, architecture)
        require_mixture_of(architecture, config.learner.model, config.learner.shards)
        require_slices(architecture, config.learner.context_parallel_size)


def check_teacher(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Require a teacher that reads the same tokens, as many at once, and whose heads the ranks of a row divide."""
    if (distill := config.learner.algorithm.distill) is not None:
        option, folder = "learner.algorithm.distill.teacher", check_model(model_of(distill.teacher))
        replay.require_same_ids(config, tokenizer, folder, option, distill.teacher)
        architecture = loaded(AutoConfig, folder, config.learner.model.trust_remote_code)
        check_context(distill.teacher, config.rollout.context_tokens, architecture)
        with _of_model(distill.teacher):
            require_slices(architecture, config.learner.context_parallel_size)


def check_tokenizer(path: str, trusted: bool = False) -> PreTrainedTokenizerBase:
    """Require a row of the model for every token; the model may have more rows. Returns the tokenizer.

    The tokenizer is loaded from the files that a checkpoint will contain, written to a scratch folder. Placeholders of
    pictures and sounds that no text prompt contains may lack a row: some families share a tokenizer.
    """
    with TemporaryDirectory(prefix="manta-saved-") as scratch:
        write_companions(companions(Path(path)), Path(scratch))
        rows = loaded(AutoConfig, scratch, trusted, path).get_text_config().vocab_size
        tokenizer: PreTrainedTokenizerBase = loaded(AutoTokenizer, scratch, trusted, path)
    tokenizer.name_or_path = path
    special = {place for place, token in tokenizer.added_tokens_decoder.items() if token.special}
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    beyond = {
        place: token
        for token, place in tokenizer.get_vocab().items()
        if place >= rows
        and (place not in special or place in used or token in str(tokenizer.chat_template or ""))
    }
    if beyond:
        last = max(beyond)
        raise ConfigError(
            f"model {path} has a vocabulary of {rows}, but its tokenizer one of {len(tokenizer)} (token "
            f"{beyond[last]!r} is id {last}); put the model's own tokenizer into the folder"
        )
    return tokenizer


def check_lora(config: RunConfig, path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Require the layers of the model that are to be adapted. path: of the model's folder, unless it is a tiny one."""
    lora = config.learner.model.lora
    if lora is None:
        return
    with TemporaryDirectory() as folder:
        if config.tiny:  # layers have the same names in any size
            path = folder
            build_tiny(Path(path), tokenizer, layers=1, width=32, heads=1, mlp=32)
        try:
            planned(path, lora, config.learner.model.trust_remote_code)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def check_ends(path: str) -> tuple[int, ...]:
    """Read a model's end tokens. ConfigError for unreadable files."""
    with _of_model(path):
        return end_tokens(path)


def loaded(auto: Any, path: str, trusted: bool = False, named: str = "") -> Any:
    """Load with a transformers Auto class from `path`. ConfigError if that fails.

    trusted: code that comes with the model may be executed. named: the model's name in the error, where it is not path.
    """
    try:
        return pretrained(auto, path, trusted)
    except CodeRefused as error:
        raise ConfigError(f"model {named or path}: {error}") from error
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"model {named or path}: {reason} Is it a Hugging Face folder or id?") from error


@contextmanager
def _of_model(named: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {named}: {error}") from error
