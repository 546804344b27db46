"""Relative keys: a key is rotated back to where its block of slots starts, so that one basis serves every position.

A rotary embedding gives the token at position p the key R(p) k. Stored is R(-anchor) R(p) k = R(p - anchor) k, where the anchor
is the position of the first slot of the token's block. R is orthogonal, so a score is exact whatever R is: a query is rotated back
by each block's anchor instead. Frequencies that are not the model's cost quality, never correctness.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from apack_compile.kernels.rotations import deinterleaved
from apack_compile.models.coordinates import TokenCoordinates

# Slots that share an anchor by default. Fewer serve the basis better, and cost a query more rotations (docs/notes/quality.md).
BLOCK = 64
# More than any model has; a plan file that claims more is damaged, and would take memory for each.
MAX_COORDINATES = 8


@dataclass(frozen=True)
class KeyRotation:
    """How keys rotate with their position.

    frequencies: radians a position, float32 `[P]`; component i of a head rotates with component i + P or, interleaved, component 2 i
    with 2 i + 1. block: slots that share an anchor. coordinates: int64 `[P]`, which of a token's coordinates each pair rotates by; None
    where there is only one.
    """

    frequencies: Tensor
    block: int
    coordinates: Tensor | None = None
    interleaved: bool = False

    @property
    def coordinate_count(self) -> int:
        """How many coordinates a token has."""
        return 1 if self.coordinates is None else int(self.coordinates.max()) + 1

    def at(self, coordinates: Tensor) -> Tensor:
        """Cosine and sine `[..., 2, P]` of the angles at coordinates `[..., C]`, float32."""
        each = coordinates if self.coordinates is None else coordinates[..., self.coordinates]
        return cosine_and_sine(each.double() * self.frequencies.double())

    def to(self, device: torch.device) -> "KeyRotation":
        """This rotation with its tensors on a device."""
        coordinates = None if self.coordinates is None else self.coordinates.to(device)
        return replace(self, frequencies=self.frequencies.to(device), coordinates=coordinates)

    @property
    def interleaved_pairs(self) -> int:
        """Pairs (2 i, 2 i + 1) of components that rotate; 0 where pairs are not interleaved."""
        return len(self.frequencies) if self.interleaved else 0


def deinterleaved_keys(states: Tensor, rotation: KeyRotation | None) -> Tensor:
    """The model's keys `[..., D]` as a packed cache has them: interleaved pairs at i and i + P, all others as they come.

    A score does not change where queries are put so as well; so whatever rotates keys knows one order of components.
    """
    return (
        deinterleaved(states, rotation.interleaved_pairs) if rotation is not None and rotation.interleaved else states
    )


def rotations_at(anchors: Tensor, frequencies: Tensor) -> Tensor:
    """Cosine and sine `[..., 2, P]` of the angles at positions `[...]`, float32."""
    return cosine_and_sine(anchors.double()[..., None] * frequencies.double())


def cosine_and_sine(angles: Tensor) -> Tensor:
    """Of angles `[..., P]`: float32 `[..., 2, P]`."""
    return torch.stack([angles.cos(), angles.sin()], dim=-2).float()


def rotations_of_blocks(positions: Tensor, coordinates: TokenCoordinates, rotation: KeyRotation) -> Tensor:
    """Rotations `[B, blocks, 2, P]` of the blocks of slots that hold `positions` `[B, N]`.

    One block more than needed: a dimension of 1 would be compiled as a constant.
    """
    anchors = torch.nn.functional.pad(positions[:, :: rotation.block], (0, 2 - min(positions.shape[1], 1)), value=-1)
    return rotation.at(coordinates.at(anchors.clamp_min(0)))


def rotary_start(padding: Tensor) -> Tensor:
    """Position `[B, 1]` of each row's first real token, where transformers' positions start; padding: bool `[B, T]`."""
    return (~padding).to(torch.uint8).argmax(1, keepdim=True)
