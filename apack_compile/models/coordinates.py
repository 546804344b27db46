"""Where tokens are for a rotary embedding: at one coordinate, or at several (multi-section RoPE: time, height, width of a picture).

Coordinates are those that the model itself gives its rotary embedding, seen by a forward pre-hook.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TokenCoordinates:
    """Coordinates of every token of some sequences, those to come included.

    known: float32 `[B, T, C]`, of the first T tokens. shift: float32 `[B, 1, C]`: later ones have their index plus this.
    """

    known: Tensor
    shift: Tensor

    @staticmethod
    def starting_at(start: Tensor, count: int = 1) -> "TokenCoordinates":
        """All `count` coordinates count up from 0 at index `start` `[B, 1]`."""
        shift = -start.float()[..., None].repeat(1, 1, count)
        return TokenCoordinates(shift[:, :0], shift)

    def at(self, positions: Tensor) -> Tensor:
        """Coordinates `[B, N, C]` of the tokens at indices `[B, N]`; anything for an index below 0."""
        later = positions[..., None] + self.shift
        tokens = self.known.shape[1]
        if tokens == 0:
            return later
        index = positions.long().clamp(0, tokens - 1)[..., None].expand_as(later)
        return torch.where(positions[..., None] < tokens, self.known.gather(1, index), later)

    def followed_by(self, chunk: Tensor, padding: Tensor, held: int) -> "TokenCoordinates":
        """With those of a chunk `[B, n, C]` that begins at index `held`; padding: bool `[B, n]`.

        What was said of the tokens before it stays. Text after it counts up from its last real token.
        """
        rows, tokens, count = chunk.shape
        before = self.at(torch.arange(held, device=chunk.device).expand(rows, -1))
        last = tokens - 1 - (~padding).flip(1).to(torch.uint8).argmax(1)
        newest = chunk.gather(1, last[:, None, None].expand(-1, -1, count)).amax(2, keepdim=True)
        shift = (newest + 1 - (held + tokens)).expand(-1, -1, count)
        none = padding.all(1)[:, None, None]
        return TokenCoordinates(torch.cat([before, chunk], 1), torch.where(none, self.shift, shift))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "TokenCoordinates":
        """With a change of the batch's rows."""
        return TokenCoordinates(change(self.known), change(self.shift))


def rotary_frequencies(model: nn.Module) -> dict[str, Tensor]:
    """The buffers `[P]` of rotary frequencies by name, as transformers calls them."""
    buffers = model.named_buffers(remove_duplicate=False)
    return {name: buffer for name, buffer in buffers if name.endswith("inv_freq") and buffer.dim() == 1}


def rotary_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that own rotary frequencies."""
    return list(dict.fromkeys(owner_of(model, name) for name in rotary_frequencies(model)))


def owner_of(model: nn.Module, buffer: str) -> nn.Module:
    """The module that has a buffer, by the buffer's name."""
    return model.get_submodule(buffer.rpartition(".")[0])


def rope_deltas_of(model: nn.Module) -> dict[str, Tensor]:
    """What a model remembers, between forward passes, of where its last prompt's pictures ended: `rope_deltas` of its modules by name."""
    owners = {name: module for name, module in model.named_modules() if hasattr(module, "rope_deltas")}
    # text alone has no pictures that end elsewhere
    none = torch.zeros(1, 1, dtype=torch.long)
    return {name: none if owner.rope_deltas is None else owner.rope_deltas.clone() for name, owner in owners.items()}


def put_rope_deltas(model: nn.Module, deltas: Mapping[str, Tensor | None]) -> None:
    """Have a model remember them; None: nothing."""
    for name, x in deltas.items():
        model.get_submodule(name).rope_deltas = x


def positions_given(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The positions `[B, n]` or `[C, B, n]` among the arguments of a rotary embedding; None where there are none."""
    found = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
    return found if isinstance(found, Tensor) and found.dim() in (2, 3) else None


def coordinates_of(positions: Tensor | None, rows: int, tokens: int, count: int = 1) -> Tensor | None:
    """The last positions of `[B, n]` or `[C, B, n]` as coordinates `[B, tokens, count]`, float32; None where they are too few.

    Positions with one coordinate have the same in all. Some models give their rotary embedding those of all tokens held as well.
    """
    if positions is None or positions.shape[-1] < tokens or positions.shape[-2] not in (1, rows):
        return None
    positions = positions[..., positions.shape[-1] - tokens :]
    stacked = positions if positions.dim() == 3 else positions[None]
    if 1 < stacked.shape[0] < count:
        return None
    return stacked[:count].permute(1, 2, 0).float().expand(rows, -1, count)


@contextmanager
def seen_positions(model: nn.Module) -> Iterator[list[tuple[nn.Module, Tensor]]]:
    """A list of all positions that rotary embeddings are given in this thread, in order."""
    thread = get_ident()
    seen: list[tuple[nn.Module, Tensor]] = []

    def see(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        positions = positions_given(args, kwargs)
        if positions is not None and get_ident() == thread:
            seen.append((module, positions))

    handles = [module.register_forward_pre_hook(see, with_kwargs=True) for module in rotary_modules(model)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced_positions(rotary: nn.Module, positions: Tensor) -> Iterator[None]:
    """Give a rotary embedding these positions `[C, 1, n]` in place of the model's, in this thread."""
    thread = get_ident()

    def replace(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        given = positions_given(args, kwargs)
        if given is None or get_ident() != thread:
            return None
        new = positions.to(given)
        return (
            (args, {**kwargs, "position_ids": new}) if "position_ids" in kwargs else ((args[0], new, *args[2:]), kwargs)
        )

    handle = rotary.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
