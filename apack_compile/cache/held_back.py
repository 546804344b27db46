"""Keys and values of a first prompt, held back until there are bases to pack them with."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from apack_compile.cache.checks import Checks
from apack_compile.cache.watch import WatchedKeys
from apack_compile.models.attention_call import ATTENTION, named_arguments

if TYPE_CHECKING:
    from apack_compile.cache.layer import CompactedLayer


@dataclass
class HeldBack:
    """States `[B, H_kv, T, D]` by layer, as the model has them.

    checks: of these states. prompt: what they are of; its `see(layer, named)` is told the arguments of each attention over them.
    """

    prompt: Any
    states: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    checks: Checks = field(default_factory=Checks)

    def take(self, layer: "CompactedLayer", key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a layer's states, and give them to the model; `checks` says whether they can be packed."""
        layer.check(key, value)
        self.checks.add(layer, key, value)
        number = layer.layer_idx
        if number in self.states:
            raise ValueError(
                f"layer {number}: the forward pass stored keys and values twice; calibrate the model first"
            )
        self.states[number] = key.detach(), value.detach()
        return WatchedKeys.of(key, SeenAttention(self, number)), value


@dataclass(frozen=True)
class SeenAttention:
    """An attention over the states of one layer, which is told and left as it is."""

    held_back: HeldBack
    layer: int

    def attend(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The attention that is called with these arguments."""
        self.held_back.prompt.see(self.layer, named_arguments(args, kwargs))
        return ATTENTION(*args, **kwargs)
