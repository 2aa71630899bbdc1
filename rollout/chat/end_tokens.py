"""End tokens of a model's turn, from the files of its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rollout.wire.model_folder import require

FILES = ("generation_config.json", "config.json")


def end_tokens(path: str) -> tuple[int, ...]:
    """Read every `eos_token_id` of a folder: one id or a list, in either file.

    Llama 3.1 ends a call and an answer with different tokens. Raises ModelMissing, and ValueError for a file that is
    not a JSON object.
    """
    require(path)
    ends: list[Any] = []
    for said in filter(None, (_read(path, name) for name in FILES)):
        for each in (said, said.get("text_config")):
            listed = each.get("eos_token_id") if isinstance(each, dict) else None
            ends += listed if isinstance(listed, list) else [listed]
    return tuple(dict.fromkeys(end for end in ends if type(end) is int and end >= 0))


def _read(path: str, name: str) -> dict[str, Any] | None:
    file = Path(path) / name
    if not file.is_file():
        return None
    try:
        said = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(said, dict):
        raise ValueError(f"{file} must hold a JSON object, not {said!r:.80}")
    return said
