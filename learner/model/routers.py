"""The routers of a mixture of experts, which no adapter changes and no format of fewer bits rounds."""

from __future__ import annotations

from torch import nn

from learner.parallel.experts import experts_in

_NAMES = ("gate", "router")  # transformers' names of what stands beside experts and chooses


def routers_in(model: nn.Module) -> set[nn.Module]:
    """Modules that choose experts, with all that they are made of; in some families they are linear layers."""
    blocks = (model.get_submodule(name.rpartition(".")[0]) for name in experts_in(model))
    found = (child for block in blocks for name, child in block.named_children() if name in _NAMES)
    return {part for router in found for part in router.modules()}
