"""What a plan gives each layer: bytes of a token, and what coding it is expected to lose."""

from collections.abc import Mapping
from dataclasses import dataclass

from apack_compile.plan.plan import STREAMS, Plan, StreamPlan


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of a token in a layer, K and V, dense in 16 bits and packed. lost: expected share of variance; None where nothing says."""

    layer: int
    dense: int
    packed: float
    lost: float | None


def layer_bytes(
    plan: Plan, vision_share: float = 0.0, shapes: Mapping[int, tuple[int, int]] | None = None
) -> tuple[LayerBytes, ...]:
    """Every layer of a plan, for prompts with this share of vision tokens; its dense tokens and bases are not counted.

    shapes: KV heads of each layer and their width; without them, layers without bases count as those that the signature names.
    """
    return tuple(
        _of_layer(plan.of_layer(layer), layer, vision_share, (shapes or {}).get(layer, plan.signature[1:3]))
        for layer in plan.every_layer
    )


def _of_layer(plan: Plan, layer: int, vision_share: float, shape: tuple[int, int]) -> LayerBytes:
    (heads, head_dim), dtype = shape, plan.signature[3]
    named, bases = plan.layers[layer].named, plan.bases.get(layer, ())
    widths = [plan.groups * basis.mean.shape[-1] for basis in bases[:2]] or [heads * head_dim] * 2
    itemsize = 4 if dtype == "torch.float32" else 2
    packed, lost = 0.0, 0.0
    for segment, share in plan.shares(vision_share).items():
        for stream, width in zip(STREAMS, widths, strict=True):
            planned = named[f"{segment}_{stream}"]
            packed += share * _token_bytes(planned, width, plan.groups, itemsize)
            lost += share * planned.expected_error / len(STREAMS)
    is_calibrated = all(stream.scope == "model" for stream in named.values())
    return LayerBytes(layer, 2 * sum(widths), packed, lost if is_calibrated else None)


def _token_bytes(planned: StreamPlan, width: int, groups: int, itemsize: int) -> int:
    """Bytes of a token of a stream, its scales included."""
    if planned.scope in ("as_is", "half"):
        return width * (itemsize if planned.scope == "as_is" else 2)
    bands = planned.bands.at_most(width // groups)
    return groups * (bands.token_bytes + (2 if planned.token_scale and bands.components else 0))
