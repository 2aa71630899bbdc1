"""What a learner will hold in memory, from its settings and the shape of its model; nothing is loaded.

    P parameters, T trained ones, R ranks that they are sharded over, N tokens of the largest row, or of a slice of it
    M of P, the matrices of linear layers
    on the device   4 P / R weights, 4 T / R gradients, 8 T / R moments, what autograd saves of N tokens, logits
                    of an adapter's base in bfloat16 2 P / R, and in NF4 2 (P - M) / R + 0.516 M / R
    on the host     the bytes that engines are sent; at times copies: while loading, publishing, saving
    moments         on the host instead, with `optim.offload`; on the device the part that is updated
                    with `optim.moments = "8bit"` 2.03 T / R; a part in float32 while it is updated

`memory_dry_run` tries the same on the device itself, when the learner starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import psutil

from learner.algorithm.algorithm import OwnCriticSettings, TurnCriticSettings
from learner.algorithm.schedule import OptimSettings
from learner.data.batch import longest_row
from learner.model.float8 import copied_bytes
from learner.model.footprint import Saved, Shape
from learner.model.lora_targets import NO_ADAPTER, Sizes
from learner.model.nf4 import BITS, dequantizing_bytes
from learner.settings import LearnerSettings
from learner.stages.settings import AnyStage, IlqlSettings, OwnStage
from learner.training.eight_bit import AT_ONCE_GPU, WORKING, block_of, number_bytes
from learner.training.stored_moments import PART

_WIDE = 4  # bytes of a float32
_HALF = 2  # of a bfloat16
_ROOM = 0.8  # of a device's memory: what an estimate may fill
_LOGIT_BLOCKS = 4  # logits, probabilities, their gradient, and a cast of it


@dataclass(frozen=True, slots=True)
class Amount:
    """Memory of one process. on_host: the host's, also where the process computes on a GPU; at_times: not always.

    lead: of rank 0 alone; moves: to host memory, in the engines' turn of a device that is shared in turns.
    """

    what: str
    nbytes: int
    on_host: bool = False
    at_times: bool = False
    lead: bool = False
    moves: bool = False


def row_tokens(settings: LearnerSettings, longest: int) -> int:
    """Input tokens of the largest packed row; longest: tokens of the longest sequence."""
    return len(longest_row(longest, settings.tokens_per_microbatch).input_ids_T)


def slice_tokens(settings: LearnerSettings, longest: int) -> int:
    """Of these, the tokens that one rank computes."""
    return -(-row_tokens(settings, longest) // settings.context_parallel_size)


def slices_exchanged(settings: LearnerSettings, saved: Saved, longest: int) -> int:
    """Bytes that a rank receives of the largest row's other slices, for attention, in a forward pass."""
    return round(saved.exchanged_per_token * slice_tokens(settings, longest))


def hidden_exchanged(settings: LearnerSettings, width: int, longest: int) -> int:
    """Bytes that a rank receives of the last hidden states of the largest row's other slices, all tokens scored."""
    others = settings.context_parallel_size - 1
    return others * slice_tokens(settings, longest) * width * _product_bytes(settings)


def state_bytes(settings: LearnerSettings, shape: Shape, lora: Sizes) -> int:
    """Weights, gradients and moments of a rank on its device: what it holds in any case."""
    trained = lora.adapter or shape.parameters
    own = 2 * _WIDE * trained + _moments_on_device(settings.optim, trained, lora)
    if lora.adapter:  # whole on every rank
        return base_bytes(settings, shape) // settings.shards + own
    return own // settings.shards


def _moment_bytes(optim: OptimSettings, numbers: int, lora: Sizes = NO_ADAPTER) -> int:
    """Of AdamW's two moments of an adapter, or else of so many trained parameters.

    In eight bits these are taken for matrices of as long blocks as most models' widths allow; vectors are few.
    """
    if optim.moments == "float32":
        return 2 * _WIDE * numbers
    if lora.adapter:
        return sum(
            round(2 * count * prod(each) * number_bytes(block_of(each))) for each, count in lora.shapes
        )
    return round(2 * number_bytes() * numbers)


def _moments_on_device(optim: OptimSettings, numbers: int, lora: Sizes = NO_ADAPTER) -> int:
    return 0 if optim.offload else _moment_bytes(optim, numbers, lora)


def base_bytes(settings: LearnerSettings, shape: Shape) -> int:
    """Of all weights as they are stored: an adapter's frozen base in the type of the products, or in NF4."""
    return _stored_bytes(settings, shape.parameters, shape.linear)


def _stored_bytes(settings: LearnerSettings, numbers: int, linear: int) -> int:
    """Of so many weights, of which `linear` are matrices of linear layers."""
    narrow = linear if settings.model.quantized else 0
    return _stored_size(settings) * (numbers - narrow) + round(BITS / 8 * narrow)


def _stored_size(settings: LearnerSettings) -> int:
    """Bytes of a weight that is not quantized."""
    frozen = settings.model.lora is not None and settings.model.dtype == "bfloat16"
    return _HALF if frozen else _WIDE


def learner_amounts(
    settings: LearnerSettings,
    shape: Shape,
    lora: Sizes,
    saved: Saved | None,
    longest: int,
    teacher: Shape | None = None,
) -> list[Amount]:
    """What each rank holds on its device.

    lora: of a low-rank adapter, zeros without one. saved: None where it cannot be told. longest: tokens of the longest
    sequence; teacher: of one that is distilled.
    """
    ranks, adapter = settings.shards, lora.adapter
    base = base_bytes(settings, shape) // ranks
    own = _WIDE * adapter or base  # of what is trained
    stored = "bfloat16" if _stored_size(settings) == _HALF else "float32"
    quantized = settings.model.quantized
    found = [Amount(f"parameters, {'NF4 and ' if quantized else ''}{stored}", base, moves=True)]
    if adapter:
        found.append(Amount("the adapter, float32", own, moves=True))
    found += [
        Amount("gradients, float32", own),
        *_moments("AdamW's moments", own, settings, settings.optim, lora),
    ]
    found += _product_amounts(settings, shape, lora)
    tokens, whole_row = slice_tokens(settings, longest), row_tokens(settings, longest)
    if settings.travels:
        found += _experts(settings, shape, adapter, tokens)
    if saved is not None:
        held = saved.row(tokens, shape.layers, settings.model.gradient_checkpointing)
        found.append(Amount(f"activations of {tokens:,} tokens", held))
        found.append(Amount("their gradients, a layer at a time", round(tokens * saved.layer_per_token)))
    if settings.model.float8:
        copies = max((copied_bytes(tokens, *each) for each in shape.sides), default=0)
        found.append(Amount("matrices of a product in float8", copies))
    block = max(settings.model.logit_block // max(tokens, 1), 8) * tokens
    found.append(Amount("logits, a block at a time", _LOGIT_BLOCKS * _WIDE * block))
    if settings.algorithm.needs_reference:
        found.append(Amount("reference policy, float32", own, moves=not adapter))
    if teacher is not None:
        found += _teacher_amounts(settings, teacher)
    if settings.algorithm.critic is not None and saved is not None and tokens < whole_row:
        seen = 2 * round(whole_row * saved.input_per_token)
        found.append(Amount("last hidden states of a whole row for values, and their gradients", seen))
    found += _critic_amounts(settings, base + (own if adapter else 0), own, lora)
    if adapter:
        if settings.ranks > 1:
            found.append(Amount("the adapter's gradients, while ranks sum them", own, at_times=True))
        merged = _WIDE * lora.adapted // max(shape.layers, 1)
        found.append(Amount("merged matrices of a layer, while publishing", merged, at_times=True))
    if quantized:
        # Every rank quantizes all of it, before there is anything else.
        whole = base_bytes(settings, shape) + _stored_size(settings) * shape.largest_layer
        beyond = whole - sum(each.nbytes for each in found if not each.at_times and not each.on_host)
        if beyond > 0:
            what = "the whole base, while it is quantized: beyond the rest"
            found.append(Amount(what, beyond, at_times=True))
    return found


def _product_amounts(settings: LearnerSettings, shape: Shape, lora: Sizes) -> list[Amount]:
    """Weights as products take them, beside those that are stored, and whole gradients."""
    adapter = lora.adapter
    found, bfloat16 = list[Amount](), settings.model.dtype == "bfloat16"
    if settings.shards > 1:
        layer = shape.largest_beside if settings.travels else shape.largest_layer
        gathered = shape.outside_layers + 2 * layer
        # Weights and their gradients in the type of the products, and the sums over ranks in float32.
        nbytes = (2 * (_HALF if bfloat16 else _WIDE) + _WIDE) * gathered
        if adapter:
            nbytes = _stored_bytes(settings, gathered, 2 * shape.largest_layer_linear)
        found.append(Amount("gathered layers, embedding and head", nbytes))
        if settings.model.sum_gradients == "step" and not adapter:
            summed = shape.parameters - (shape.experts.parameters if settings.travels else 0)
            found.append(Amount("whole gradients until they are summed, float32", _WIDE * summed))
    elif bfloat16 and not adapter:
        whole = not settings.model.gradient_checkpointing
        cast = shape.parameters if whole else shape.outside_layers + shape.largest_layer
        found.append(Amount("weights cast for products", _HALF * cast))
    if lora.experts:  # kept for the backward pass, unless they are made again
        once = settings.model.gradient_checkpointing
        entries = lora.experts // max(shape.experts.layers, 1) if once else lora.experts
        found.append(Amount("experts' weights with their adapters", _stored_size(settings) * entries))
    if settings.model.quantized:
        working = dequantizing_bytes(shape.largest_linear, _stored_size(settings))
        found.append(Amount("a matrix, dequantized", working))
    return found


def _teacher_amounts(settings: LearnerSettings, teacher: Shape) -> Iterator[Amount]:
    """Of a frozen model that scores before the policy does. Of a mixture all experts are gathered."""
    size, several = _product_bytes(settings), settings.shards > 1
    yield Amount("teacher, float32", _WIDE * teacher.parameters // settings.shards, moves=True)
    if not several and size == _WIDE:
        return
    made = size * (teacher.outside_layers + (1 + several) * teacher.largest_layer)
    what = "gathered layers" if several else "weights cast for products"
    yield Amount(f"{what} of the teacher, embedding and head", made, at_times=True)
    distill = settings.algorithm.distill
    if distill is not None and distill.divergence != "sampled":
        yield Amount("the teacher's head, while the policy is compared with it", size * teacher.head)


def _critic_amounts(settings: LearnerSettings, model: int, trained: int, lora: Sizes) -> list[Amount]:
    """Of a critic with a model of its own; bytes of the model and of what is trained of it."""
    critic = settings.algorithm.critic
    if not isinstance(critic, OwnCriticSettings | TurnCriticSettings):
        return []
    slow = isinstance(critic, TurnCriticSettings)
    return [
        Amount("critic and its slow copy" if slow else "critic", (1 + slow) * model, moves=True),
        Amount("the critic's gradients", trained),
        *_moments("the critic's moments", trained, settings, critic.optim, lora),
    ]


def _experts(settings: LearnerSettings, shape: Shape, adapter: int, tokens: int) -> list[Amount]:
    """What a rank holds besides where tokens travel to experts; routers give every rank as many."""
    size, recomputed = _product_bytes(settings), settings.model.gradient_checkpointing
    experts, ranks = shape.experts, settings.shards
    found = [Amount("tokens on their way to experts and back", 2 * size * experts.sent * tokens)]
    if adapter:  # stored in the type of the products, and without gradients
        return found
    cast = experts.largest if recomputed else experts.parameters
    if size == _HALF:
        found.append(Amount("own experts cast for products", size * cast // ranks))
    return [*found, Amount("gradients of a layer's own experts", (size + _WIDE) * experts.largest // ranks)]


def _product_bytes(settings: LearnerSettings) -> int:
    """Of a number as products take it."""
    return _HALF if settings.model.dtype == "bfloat16" else _WIDE


def _moments(
    what: str, trained_bytes: int, settings: LearnerSettings, optim: OptimSettings, lora: Sizes
) -> list[Amount]:
    """AdamW's two moments of trained parameters with so many bytes, and where they lie."""
    numbers, coded = trained_bytes // _WIDE, optim.moments == "8bit"
    held = _moment_bytes(optim, numbers, lora)
    kind = "8 bits a number" if coded else "float32"
    found = [Amount(f"{what}, {kind}", held, on_host=optim.offload, moves=not optim.offload)]
    if settings.model.device == "cuda" and (optim.offload or coded):
        largest = max((prod(each) for each, _ in lora.shapes), default=numbers)
        part = WORKING * min(largest, AT_ONCE_GPU) if coded else 2 * min(largest, PART)
        found.append(Amount(f"{what}, the part that is updated", _WIDE * part, at_times=True))
    return found


def settled(
    settings: LearnerSettings,
    shape: Shape,
    saved: Saved | None,
    longest: int,
    device_bytes: int,
    teacher: Shape | None = None,
) -> LearnerSettings:
    """The settings with `sum_gradients` said: "step" where whole gradients leave a fifth of a rank's memory free.

    device_bytes: of the device of a rank; others as in `learner_amounts`.
    """
    if settings.model.sum_gradients is not None or settings.model.lora is not None:
        return settings
    found = {}
    for choice in ("step", "row"):
        model = settings.model.model_copy(update={"sum_gradients": choice})
        found[choice] = settings.model_copy(update={"model": model})
    amounts = learner_amounts(found["step"], shape, NO_ADAPTER, saved, longest, teacher)
    fits = saved is not None and sum(each.nbytes for each in amounts) <= _ROOM * device_bytes
    return found["step" if settings.ranks > 1 and fits else "row"]


def host_share(ranks: int) -> int:
    """Bytes of this host's memory for each of the ranks on it."""
    return psutil.virtual_memory().total // ranks


def stage_amounts(
    settings: LearnerSettings,
    stages: Sequence[AnyStage],
    width: int,
    vocabulary: int,
    shape: Shape,
    lora: Sizes,
) -> list[Amount]:
    """What stages hold on each rank's device besides, while they go on. width: of the model's hidden states."""
    found = []
    trained = lora.adapter or shape.parameters // settings.shards
    later = _moments_on_device(settings.optim, trained, lora)
    for index, stage in enumerate(stages):
        if not isinstance(stage, OwnStage):
            more = _moments_on_device(stage.optim, trained, lora) - later
            beyond = ", beyond those of reinforcement learning" if later else ""
            if more > 0:
                found.append(Amount(f"AdamW's moments in stage {index}{beyond}", more, at_times=True))
        if isinstance(stage, IlqlSettings):
            nbytes = _value_head_bytes(stage, width, vocabulary, gradients=True) // settings.shards
            found.append(Amount(f"value heads of stage {index}, with a slow copy", nbytes, at_times=True))
    return found


def head_bytes(stages: Sequence[AnyStage], width: int, vocabulary: int) -> int:
    """Value heads in a stage's checkpoint: weights, two moments, a slow copy; of the stage with the most."""
    heads = (each for each in stages if isinstance(each, IlqlSettings))
    return max((_value_head_bytes(each, width, vocabulary) for each in heads), default=0)


def _value_head_bytes(stage: IlqlSettings, width: int, vocabulary: int, gradients: bool = False) -> int:
    actions, state = stage.head_parameters(width, vocabulary)
    wide = (1 + gradients) * (actions + state) + actions  # a slow copy of action values alone
    return _WIDE * wide + _moment_bytes(stage.value_optim, actions + state)


def away_amount(device: Sequence[Amount]) -> Amount:
    """What of the amounts on a rank's device lies in host memory while engines have the device; the room is kept."""
    moved = sum(each.nbytes for each in device if each.moves)
    return Amount("room for what moves while engines have the GPU", moved, on_host=True)


def host_amounts(
    settings: LearnerSettings, shape: Shape, lora: Sizes, sent_bytes: int, heads: int = 0
) -> list[Amount]:
    """What ranks hold in the host's memory besides.

    sent_bytes: of a version, as engines receive it; heads: the `head_bytes` of the stages.
    """
    ranks = settings.shards
    trained = lora.adapter or shape.parameters
    found = [Amount("a version for the engines", sent_bytes, on_host=True, lead=True)] if sent_bytes else []
    if settings.algorithm.keeps:
        kept = _WIDE * trained + _moment_bytes(settings.optim, trained, lora)
        critic = settings.algorithm.critic
        if isinstance(critic, OwnCriticSettings | TurnCriticSettings):
            slow = isinstance(critic, TurnCriticSettings)
            kept += _WIDE * (1 + slow) * trained + _moment_bytes(critic.optim, trained, lora)
        kept //= 1 if lora.adapter else ranks  # an adapter is whole on every rank
        found.append(Amount("copy of weights and moments, in a step", kept, on_host=True, at_times=True))
    outside, layer = shape.outside_layers, shape.largest_layer
    examined, read = _WIDE * (outside + layer), _WIDE * max(outside, layer)
    found.append(
        Amount("first layers, examined before loading", examined, on_host=True, at_times=True, lead=True)
    )
    found.append(Amount("a layer of the files, while loading", read, on_host=True, at_times=True))
    copied = checkpoint_bytes(settings, shape, lora, heads) // (1 if lora.adapter else ranks)
    found.append(
        Amount(
            "copy of weights and moments, while saving",
            copied,
            on_host=True,
            at_times=True,
            lead=bool(lora.adapter),  # merged weights come whole
        )
    )
    return found


def checkpoint_bytes(settings: LearnerSettings, shape: Shape, lora: Sizes, heads: int = 0) -> int:
    """Size of the largest checkpoint: float32 weights (with an adapter merged, and the adapter), and moments.

    heads: the `head_bytes` of the stages, which the checkpoints of a stage have besides.
    """
    critic = settings.algorithm.critic
    own = isinstance(critic, OwnCriticSettings | TurnCriticSettings)
    slow = isinstance(critic, TurnCriticSettings)
    trained = lora.adapter or shape.parameters
    weights = (shape.parameters + lora.adapter) * (1 + own + slow)
    moments = _moment_bytes(settings.optim, trained, lora)
    if isinstance(critic, OwnCriticSettings | TurnCriticSettings):
        moments += _moment_bytes(critic.optim, trained, lora)
    return _WIDE * weights + moments + heads
