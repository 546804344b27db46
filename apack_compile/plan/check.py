"""Whether a plan is one that a cache can use."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from apack_compile.kernels.format import BANDS, Bands, StreamBasis
from apack_compile.plan.coarse_rule import CoarseRule, feature_count
from apack_compile.plan.plan import (
    BASIS_DTYPES,
    FITTED_SCOPES,
    MIN_TAIL_SLOTS,
    MODALITIES,
    STREAMS,
    LayerPlan,
    Plan,
    StreamPlan,
)
from apack_compile.plan.rotation import MAX_COORDINATES, KeyRotation

SCOPES = ("as_is", "half", *FITTED_SCOPES, "model")


class Claim(NamedTuple):
    """Something that must hold of a plan: whether it does, what it is about, what was found, what is allowed."""

    holds: bool
    about: str
    found: Any
    allowed: str


def check_plan(plan: Plan, name: str) -> None:
    """Raise ValueError, which starts with `name`, for a plan that no cache can use."""
    for claim in claims(plan):
        if not claim.holds:
            raise ValueError(f"{name}: {claim.about} is {claim.found!r}, must be {claim.allowed}")


def claims(plan: Plan) -> Iterator[Claim]:
    """What must hold of a plan; a claim may rely on those before it."""
    about_model = plan.signature
    known = isinstance(about_model, tuple) and len(about_model) == 4 and isinstance(about_model[3], str)
    known = known and all(is_count(number) and number > 0 for number in about_model[:3])
    yield Claim(
        known, "signature", about_model, "(layers, KV heads, head_dim, dtype), as apack_compile.plan_for gives it"
    )
    inside = bool(plan.layers) and all(is_count(layer) and layer < about_model[0] for layer in plan.layers)
    yield Claim(inside, "layers", list(plan.layers), f"one or more of 0 to {about_model[0] - 1}")
    yield Claim(is_count(plan.tail_slots), "tail_slots", plan.tail_slots, "an integer >= 0")
    yield Claim(is_count(plan.first_tokens), "first_tokens", plan.first_tokens, "an integer >= 0")
    yield Claim(is_count(plan.groups) and plan.groups > 0, "groups", plan.groups, "an integer >= 1")
    yield Claim(isinstance(plan.separates_vision, bool), "separates_vision", plan.separates_vision, "True or False")
    for layer, streams in plan.layers.items():
        names = [f"{segment}_{stream}" for segment in plan.segments for stream in STREAMS]
        yield Claim(list(streams.named) == names, f"layer {layer} streams", list(streams.named), ", ".join(names))
        for name, stream in streams.named.items():
            yield from stream_claims(stream, f"layer {layer} {name}")
    scopes = {stream.scope for streams in plan.layers.values() for stream in streams.streams}
    fitted = sorted(scopes.intersection(FITTED_SCOPES))
    alike = not fitted or len(scopes) == 1
    yield Claim(alike, "scope", sorted(scopes), f"{' or '.join(fitted)} for all or for none")
    tail = plan.tail_slots >= MIN_TAIL_SLOTS or not fitted
    yield Claim(tail, "tail_slots", plan.tail_slots, f">= {MIN_TAIL_SLOTS} where bases are fitted to each cache")
    wanted = sorted(layer for layer, streams in plan.layers.items() if uses_bases(streams))
    yield Claim(sorted(plan.bases) == wanted, "layers with bases", sorted(plan.bases), f"{wanted}")
    for layer, bases in plan.bases.items():
        named = plan.layers[layer].named
        yield Claim(len(bases) == len(named), f"layer {layer} bases", len(bases), f"{len(named)}: {', '.join(named)}")
        for (name, stream), basis in zip(named.items(), bases, strict=True):
            yield from basis_claims(stream, basis, plan.groups, f"layer {layer} {name}")
        for i, other in enumerate(bases[:-2]):
            text, name = bases[i % 2 - 2], list(named)[i]
            alike = 0 in (text.mean.numel(), other.mean.numel()) or text.mean.shape == other.mean.shape
            yield Claim(
                alike, f"layer {layer} mean of {name}", shape_of(other.mean), f"that of text, {shape_of(text.mean)}"
            )
    if plan.coarse is not None:
        yield Claim(plan.tiers is None, "coarse", "given", "null where there are tiers: they place tokens too")
        yield Claim(scopes <= {"model"}, "coarse", "given", "null unless all bases are model-scoped")
        heads = about_model[1]
        dims = {i: [plan.groups * b.mean.shape[-1] // heads for b in bases[-2:]] for i, bases in plan.bases.items()}
        yield from coarse_claims(plan.coarse, {i: feature_count(heads, *both) for i, both in sorted(dims.items())})
    if plan.rotation is not None:
        yield from rotation_claims(plan.rotation, head_dim_limit(plan))
        yield Claim(
            plan.tiers is None, "rotation", "given", "null where there are tiers: they move tokens between blocks"
        )
        yield Claim(scopes <= {"model"}, "rotation", "given", "null unless all bases are model-scoped")
    yield from window_claims(plan)


def window_claims(plan: Plan) -> Iterator[Claim]:
    """What must hold of a plan's window, and of the plans of layers with other windows."""
    known = plan.window is None or (is_count(plan.window) and plan.window > 0)
    yield Claim(known, "window", plan.window, "an integer >= 1, or None")
    for name in ("tiers", "coarse"):
        alone = plan.window is None or getattr(plan, name) is None
        yield Claim(alone, name, "given", f"null where there is a window, here of {plan.window}")
    taken = set(plan.layers)
    for window, part in plan.windows.items():
        about = f"window {window}"
        yield Claim(isinstance(part, Plan), about, type(part).__name__, "a Plan")
        for claim in claims(part):
            yield claim._replace(about=f"{about} {claim.about}")
        own = part.window == window and window not in (None, plan.window)
        yield Claim(own, f"{about} window", part.window, f"{window}, and not that of the other layers")
        yield Claim(
            not part.windows, f"{about} windows", list(part.windows), "empty: one plan has those of all windows"
        )
        for name in ("signature", "ranks"):
            found, expected = getattr(part, name), getattr(plan, name)
            yield Claim(found == expected, f"{about} {name}", found, f"that of the other layers, {expected}")
        twice = sorted(taken.intersection(part.layers))
        yield Claim(not twice, f"{about} layers", twice, "layers of no other window")
        taken.update(part.layers)


def coarse_claims(rule: CoarseRule, features: dict[int, int]) -> Iterator[Claim]:
    """What must hold of a rule that tells coarse tokens from fine ones by so many features of each layer."""
    layers = list(features)
    yield Claim(rule.modality in MODALITIES, "coarse modality", rule.modality, f"one of {', '.join(MODALITIES)}")
    share = isinstance(rule.share, float) and 0 < rule.share < 1
    yield Claim(share, "coarse share", rule.share, "a number between 0 and 1")
    yield Claim(sorted(rule.weights) == layers, "layers with coarse weights", sorted(rule.weights), f"{layers}")
    for layer, weights in rule.weights.items():
        about = f"layer {layer} coarse weights"
        yield Claim(isinstance(weights, torch.Tensor), about, type(weights).__name__, "a tensor")
        yield Claim(weights.dtype == torch.float32, f"{about} dtype", weights.dtype, "torch.float32")
        yield Claim(weights.shape == (features[layer],), f"{about} shape", shape_of(weights), f"({features[layer]},)")
        yield Claim(bool(weights.isfinite().all()), about, "NaN or Inf somewhere", "finite")


def head_dim_limit(plan: Plan) -> int:
    """What the head_dim of a plan's keys is or, where its layers are not shaped as the signature says, may be at most."""
    _, heads, head_dim, _ = plan.signature
    widths = [bases[-2].mean.shape[-1] for bases in plan.bases.values()]
    return head_dim if set(widths) <= {heads * head_dim // plan.groups} else min(widths)


def rotation_claims(rotation: KeyRotation, head_dim: int) -> Iterator[Claim]:
    """What must hold of the way keys are rotated back."""
    yield Claim(is_count(rotation.block) and rotation.block > 0, "rotation block", rotation.block, "an integer >= 1")
    yield Claim(isinstance(rotation.interleaved, bool), "rotation interleaved", rotation.interleaved, "True or False")
    frequencies = rotation.frequencies
    yield Claim(isinstance(frequencies, torch.Tensor), "rotation frequencies", type(frequencies).__name__, "a tensor")
    yield Claim(frequencies.dtype == torch.float32, "rotation frequencies dtype", frequencies.dtype, "torch.float32")
    fits = frequencies.dim() == 1 and 0 < 2 * len(frequencies) <= head_dim
    yield Claim(fits, "rotation frequencies shape", shape_of(frequencies), f"(P,) with 1 <= P <= {head_dim // 2}")
    yield Claim(bool(frequencies.isfinite().all()), "rotation frequencies", "NaN or Inf somewhere", "finite")
    if rotation.coordinates is not None:
        yield from coordinate_claims(rotation.coordinates, len(frequencies))


def coordinate_claims(coordinates: torch.Tensor, pairs: int) -> Iterator[Claim]:
    """What must hold of which coordinate each of so many pairs rotates by."""
    yield Claim(
        isinstance(coordinates, torch.Tensor), "rotation coordinates", type(coordinates).__name__, "a tensor or None"
    )
    yield Claim(coordinates.dtype == torch.int64, "rotation coordinates dtype", coordinates.dtype, "torch.int64")
    yield Claim(coordinates.shape == (pairs,), "rotation coordinates shape", shape_of(coordinates), f"({pairs},)")
    low, high = int(coordinates.min()), int(coordinates.max())
    about, allowed = "smallest and largest rotation coordinate", f"from 0 to {MAX_COORDINATES - 1}"
    yield Claim(low >= 0 and high < MAX_COORDINATES, about, (low, high), allowed)


def stream_claims(stream: StreamPlan, where: str) -> Iterator[Claim]:
    """What must hold of a stream's plan by itself."""
    yield Claim(stream.scope in SCOPES, f"{where} scope", stream.scope, f"one of {', '.join(SCOPES)}")
    yield Claim(isinstance(stream.token_scale, bool), f"{where} token_scale", stream.token_scale, "True or False")
    error = stream.expected_error
    share = isinstance(error, (int, float)) and not isinstance(error, bool) and 0 <= error <= 1
    yield Claim(share, f"{where} expected_error", error, "a number from 0 to 1")
    counts = stream.bands.counts
    known = isinstance(counts, tuple) and len(counts) == len(BANDS) and all(is_count(count) for count in counts)
    yield Claim(known, f"{where} bands", counts, f"{len(BANDS)} integers >= 0")
    if stream.scope in ("as_is", "half"):
        yield Claim(not any(counts), f"{where} bands", counts, f"{Bands().counts} where the stream is kept as it is")
    else:
        yield Claim(any(counts), f"{where} bands", counts, "at least one component")
    if stream.scope in FITTED_SCOPES:
        one = set(stream.bands.widths) in ({16}, {4})
        yield Claim(
            one, f"{where} bands", counts, "all 16-bit or all 4-bit components where bases are fitted to each cache"
        )
    if stream.scope != "model":
        yield Claim(not stream.token_scale, f"{where} token_scale", True, "False unless the basis is model-scoped")


def basis_claims(stream: StreamPlan, basis: StreamBasis, groups: int, where: str) -> Iterator[Claim]:
    """What must hold of a stream's basis: float32 or float16, finite, and of the shape that its bands need."""
    for name, tensor in basis._asdict().items():
        yield Claim(isinstance(tensor, torch.Tensor), f"{where} {name}", type(tensor).__name__, "a tensor")
    allowed = {"mean": BASIS_DTYPES, "decoder": (basis.mean.dtype,), "step": (torch.float32,)}
    for name, dtypes in allowed.items():
        found = getattr(basis, name).dtype
        yield Claim(found in dtypes, f"{where} {name} dtype", found, " or ".join(map(str, dtypes)))
    if stream.scope != "model":
        empty = not any(tensor.numel() for tensor in basis)
        yield Claim(empty, f"{where} basis", [shape_of(t) for t in basis], f"empty for the scope {stream.scope}")
        return
    width = basis.mean.shape[-1] if basis.mean.dim() == 3 else 0
    yield Claim(
        width > 0 and basis.mean.shape[:2] == (1, groups),
        f"{where} mean shape",
        shape_of(basis.mean),
        f"(1, {groups}, W)",
    )
    yield from shape_claims(stream.bands, basis, groups, width, where)
    for name, tensor in basis._asdict().items():
        yield Claim(bool(tensor.isfinite().all()), f"{where} {name}", "NaN or Inf somewhere", "finite")
    yield Claim(bool((basis.step > 0).all()), f"{where} step", float(basis.step.min()), "> 0")


def shape_claims(bands: Bands, basis: StreamBasis, groups: int, width: int, where: str) -> Iterator[Claim]:
    """What must hold of the shapes of decoder and step."""
    rank = bands.components
    yield Claim(rank <= width, f"{where} bands", bands.counts, f"at most the basis' {width} components")
    for name, tensor, shape in (
        ("decoder", basis.decoder, (1, groups, rank, width)),
        ("step", basis.step, (1, groups, rank)),
    ):
        yield Claim(
            tensor.shape == shape, f"{where} {name} shape", shape_of(tensor), f"{shape} for the bands {bands.counts}"
        )


def uses_bases(streams: LayerPlan) -> bool:
    """Whether a layer has a model-scoped stream."""
    return any(stream.scope == "model" for stream in streams.streams)


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """A shape that prints as a tuple."""
    return tuple(tensor.shape)


def is_count(value: object) -> bool:
    """Whether a value is an integer >= 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
