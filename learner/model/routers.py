"""The routers of a mixture of experts, which no adapter changes and no format of fewer bits rounds."""

from __future__ import annotations

from torch import nn

EXPERTS = "experts"  # transformers' name of a layer's experts
_ROUTERS = ("gate", "router")  # of what stands beside them and chooses


def routers_in(model: nn.Module) -> set[nn.Module]:
    """Modules that choose experts, with all that they are made of; in some families they are linear layers."""
    beside = (dict(block.named_children()) for block in model.modules())
    found = (
        each for children in beside if EXPERTS in children for each in map(children.get, _ROUTERS) if each
    )
    return {part for router in found for part in router.modules()}
