"""Decode attention over a packed cache against the best dense attention, one query token, by shape, length and batch.

`python benchmarks/attend.py`: what the plan would store for `--ratio`, or the paper's plan (AttentionPack, arXiv 2603.23914: rank 64 in
16 bits over all heads jointly, K and V), in one run with dense attention over a cache of the same dtype.

The bands of a ratio are `budget_plan`'s over typical variances (`typical_variance` of apack_compile/plan/choice.py). The bases and
codes are random: time does not depend on them. From ratio 5 and 1,024 tokens on, three quarters of the tokens are coarse, as in a real
plan: a segment more.
Head groups are as many as `optimize` chooses on the device, unless `--groups` says otherwise; they trade quality for arithmetic
(docs/notes/performance.md). Bases are float32; where those of all layers would weigh too much, `optimize` stores them in 16 bits.

`share_of_byte_limit`: bytes that a step must read (codes, scales, positions, dense tokens, bases) over its time, as a share of the
bandwidth of a copy in the same run. It can pass 1 where the cache of the processor holds a layer. `share_of_limit`: the time model's
tightest limit (apack_compile/plan/time_model.py) over the time; `predicted_speedup`: what the model expected.
`--instructions`: sets by which a CPU attends in the same run, called without the dispatcher, which `packed` is called through.
`thread_speedup`: how much faster all threads do arithmetic than one, right before and after a row, whichever is less: two virtual
cores may be those of one core.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from harness import Row, copy_bandwidth, interleaved, print_table, thread_speedup, write_json
from limit_share import limit_columns
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import apack_compile  # noqa: F401  (registers the operations)
from apack_compile.kernels.attend import cpu as attend_cpu
from apack_compile.kernels.format import BANDS, Bands, StreamBasis
from apack_compile.kernels.native import INSTRUCTION_SETS, SETS
from apack_compile.kernels.ops import implementations
from apack_compile.kernels.state import KIND_NAMES, TEXT, DenseSegment, PackedState, PackedStream, Segment
from apack_compile.models.coordinates import TokenCoordinates
from apack_compile.plan.basis import Spectrum
from apack_compile.plan.budget import StreamStatistics, budget_plan, spare_slots
from apack_compile.plan.choice import Groups, PackedLayers, Weights, head_groups_for, typical_variance
from apack_compile.plan.coarse_rule import COARSE_SHARE, NEWEST, CoarseRule, tells_apart
from apack_compile.plan.plan import FIRST_TOKENS, Plan, StreamPlan
from apack_compile.plan.presets.attentionpack import attentionpack_plan
from apack_compile.plan.rotation import BLOCK, KeyRotation, rotations_of_blocks
from apack_compile.plan.time_model import Load, is_aligned

SDPA = torch.nn.functional.scaled_dot_product_attention
# Harm of a fine token over that of a coarse one, keys and values: geometric means over the layers of SmolLM2-135M, text.
FINE_HARM = (25.0, 33.0)
PAPER_RANK, PAPER_TAIL = 64, 32
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Shape:
    """Query heads, KV heads and head_dim of a model, the base of its rotary frequencies, and by how much positions are divided.

    parameters, layers, windowed: of the whole model, of which so many layers have a window. pictures: whether it sees any.
    """

    query_heads: int
    heads: int
    head_dim: int
    rope_theta: float
    parameters: int
    layers: int
    rope_factor: float = 1.0
    windowed: int = 0
    pictures: bool = True

    @property
    def frequencies(self) -> Tensor:
        """Rotary frequencies, float32 `[head_dim / 2]`."""
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        return (self.rope_theta**-pairs / self.rope_factor).float()


SHAPES = {
    "Qwen2.5-VL-7B": Shape(28, 4, 128, 1e6, 8_292_166_656, 28),
    "LLaVA-1.5-7B": Shape(32, 32, 128, 1e4, 7_063_427_072, 32),
    "SmolLM2-135M": Shape(9, 3, 64, 1e5, 134_515_008, 30, pictures=False),
    "Gemma3-4B": Shape(8, 4, 256, 1e6, 4_315_317_824, 34, rope_factor=8, windowed=29),
}


def default_groups(shape: Shape, ratio: float | None, dtype: torch.dtype, key_block: int, device: str) -> int:
    """Head groups that `optimize` uses for a ratio; one for the paper's plan."""
    return 1 if ratio is None else planned(shape, ratio, dtype, key_block, device).count


def planned(shape: Shape, ratio: float, dtype: torch.dtype, key_block: int | None, device: str) -> Groups:
    """What `optimize` chooses for a ratio: head groups, and where none are given the slots that share an anchor."""
    one = PackedLayers(shape.query_heads, shape.heads, shape.head_dim)
    full = replace(one, count=shape.layers - shape.windowed)
    layers = (full, replace(one, count=shape.windowed, has_window=True)) if shape.windowed else (full,)
    weights = Weights(shape.parameters * dtype.itemsize, pictures=shape.pictures, coarse=True)
    return head_groups_for(layers, dtype, ratio, key_block, device, weights)


def synthetic_plan(
    shape: Shape, groups: int, ratio: float | None, tokens: int, coarse: bool = False, device: str = "cpu"
) -> Plan:
    """One layer's plan: for a ratio, or the paper's. coarse: with coarse tokens, where a real plan of this ratio has them.

    Where plans have whole tiles, keys count twice: streams differ, as those of a model do.
    """
    if ratio is None:
        ranks = {f"{modality}_{stream}": PAPER_RANK for modality in ("vision", "text") for stream in ("key", "value")}
        return attentionpack_plan([0], ranks, PAPER_TAIL)
    width = shape.heads * shape.head_dim // groups
    variance = typical_variance(width)
    deviation = variance.sqrt().expand(1, groups, width)
    steps = {band.bits: deviation * band.step for band in BANDS}
    rows = torch.randn(1, groups, width, width) / width**0.5
    spectrum = Spectrum(torch.zeros(1, groups, width), rows, deviation, steps)
    statistics = StreamStatistics(spectrum, variance.expand(groups, width))
    aligned = is_aligned(device)
    of_keys = replace(statistics, weights=2 * statistics.weights) if aligned else statistics
    segments = {"text": (of_keys, statistics)}
    if not coarse or not tells_apart(ratio, tokens):
        return budget_plan({0: segments}, ratio, tokens, 0.0, aligned=aligned)
    segments["coarse_text"] = (of_keys, statistics)
    segments["fine_text"] = tuple(replace(statistics, weights=statistics.weights * harm) for harm in FINE_HARM)
    rules = {"text": CoarseRule("text", COARSE_SHARE, {})}
    return budget_plan({0: segments}, ratio, tokens, 0.0, rules=rules, aligned=aligned)


@dataclass(frozen=True)
class Packed:
    """One layer's state, the bands of its streams in the operations' order, and the bytes that a step reads."""

    state: PackedState
    bands: tuple[Bands, ...]

    @property
    def bytes_read(self) -> int:
        """Bytes of all tensors but the free slots'."""
        return sum(x.nbytes for x in (*own_tensors(self.state), *bases_of(self.state)))


def packed_state(
    plan: Plan,
    shape: Shape,
    groups: int,
    tokens: int,
    batch: int,
    dtype: torch.dtype,
    device: str,
    filled: bool = True,
) -> Packed:
    """A cache of `tokens` text tokens, the last of them in the tail, with random codes and free slots full of zeros.

    filled: else codes are zeros too, which take no memory until they are read.
    """
    stored = tokens - FIRST_TOKENS - plan.tail_slots
    coarse = [] if plan.coarse is None else [round(COARSE_SHARE * max(stored - NEWEST, 0))]
    # slots of each packed segment, and how many of them are held
    held = [*coarse, 0, stored - sum(coarse)]
    slots = [*held[:-1], held[-1] + spare_slots(tokens)]
    width = shape.heads * shape.head_dim // groups
    dense = [
        torch.randn(batch, shape.heads, n, shape.head_dim, device=device, dtype=dtype)
        for n in (FIRST_TOKENS, FIRST_TOKENS, plan.tail_slots, plan.tail_slots)
    ]
    streams = []
    for i, stream in enumerate(plan.layers[0].streams):
        per_sequence = stream.scope == "sequence"
        kind = torch.float16 if per_sequence else torch.float32
        size = (batch if per_sequence else 1, groups)
        basis = StreamBasis(
            torch.randn(*size, width, device=device).to(kind),
            (torch.randn(*size, stream.bands.components, width, device=device) / width**0.5).to(kind),
            torch.rand(*size, stream.bands.components, device=device) + 0.5,
        )
        codes = packed_codes(stream, batch, groups, slots[i // 2], held[i // 2] if filled else 0, device)
        streams.append(PackedStream(*codes, basis, stream.bands))
    position = torch.arange(FIRST_TOKENS + sum(slots), dtype=torch.int32, device=device).expand(batch, -1)
    first_positions, *positions = (x.contiguous() for x in position.split([FIRST_TOKENS, *slots], dim=1))
    rotation = None if plan.rotation is None else plan.rotation.to(torch.device(device))
    kinds = map(KIND_NAMES.index, plan.segments)
    segments = [
        Segment(kind, key, value, where, None if rotation is None else rotations_of(where, rotation))
        for kind, key, value, where in zip(kinds, streams[::2], streams[1::2], positions, strict=True)
        if kind == TEXT or where.shape[1]
    ]
    # the newest token is the query's own
    cursor = torch.tensor([tokens + 1, FIRST_TOKENS + stored, FIRST_TOKENS], device=device)
    first, tail = DenseSegment(*dense[:2]), DenseSegment(*dense[2:])
    block = 0 if rotation is None else rotation.block
    state = PackedState(tuple(segments), first, first_positions, tail, cursor, block)
    return Packed(state, tuple(stream.bands for stream in streams))


def packed_codes(stream: StreamPlan, batch: int, groups: int, slots: int, stored: int, device: str) -> list[Tensor]:
    """Codes and token scales of one stream."""
    size, count = (batch, groups, slots), stream.bands.counts[0]
    codes = torch.zeros((*size, stream.bands.token_bytes), dtype=torch.uint8, device=device)
    if stored:
        codes[:, :, :stored].random_(0, 256)
        halves = torch.randn(batch, groups, stored, count, device=device).half()
        codes[:, :, :stored, : 2 * count] = halves.view(torch.uint8)
    scale = torch.ones(size, dtype=torch.float16, device=device)
    scale[:, :, :stored] += torch.rand(batch, groups, stored, device=device).half() - 0.5
    return [codes, scale if stream.token_scale else torch.empty(0, dtype=torch.float16, device=device)]


def dense_calls(shape: Shape, query: Tensor, key: Tensor, value: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Ways to spell dense decode attention, of which the fastest is the baseline."""
    share = shape.query_heads // shape.heads
    grouped = query.unflatten(1, (shape.heads, share)).flatten(2, 3)
    if query.device.type == "cpu":
        # a product with two rows is faster in bfloat16 than one with a vector
        twice = grouped.expand(-1, -1, 2, -1) if share == 1 else grouped
        return {
            "sdpa": lambda: SDPA(query, key, value, enable_gqa=share > 1),
            "sdpa, query heads as rows": lambda: SDPA(twice, key, value),
        }
    calls: dict[str, Callable[[], Tensor]] = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):

        def by_heads(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel([backend]):
                return SDPA(query, key, value, enable_gqa=share > 1)

        def by_rows(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel([backend]):
                return SDPA(grouped, key, value)

        calls[backend.name] = by_heads
        calls[f"{backend.name}, query heads as rows"] = by_rows
    from torch.nn.attention.flex_attention import flex_attention

    flex = torch.compile(flex_attention, dynamic=False)
    calls["flex_attention"] = lambda: flex(query, key, value, enable_gqa=share > 1)
    return calls


def fp8_call(
    shape: Shape, query: Tensor, key: Tensor, value: Tensor, dense: Callable[..., Any]
) -> Callable[[], Tensor]:
    """Dense attention over keys and values stored in float8 with a scale per token and head."""
    codes = []
    for states in (key, value):
        scale = states.float().abs().amax(-1, keepdim=True) / torch.finfo(FP8).max
        codes.append(((states.float() / scale).to(FP8), scale.to(query.dtype)))

    @torch.compile(dynamic=False)
    def widened() -> tuple[Tensor, Tensor]:
        (k, k_scale), (v, v_scale) = codes
        return k.to(query.dtype) * k_scale, v.to(query.dtype) * v_scale

    return lambda: dense(shape, query, *widened())


def working(calls: dict[str, Callable[[], Tensor]]) -> dict[str, Callable[[], Tensor]]:
    """Those that this machine and shape can run."""
    found = {}
    for name, call in calls.items():
        try:
            call()
        except RuntimeError:
            continue
        found[name] = call
    return found


def measured(
    name: str, tokens: int, batch: int, ratio: float | None, groups: int | None, dtype: torch.dtype, device: str,
    bandwidth: float, seconds: float, key_block: int = 0, instructions: Sequence[str] = (),
) -> Row:  # fmt: skip
    """One row: a shape, a length, a batch, a plan. instructions: sets by which a CPU attends too, in the same run."""
    shape = SHAPES[name]
    groups = groups if groups and ratio else default_groups(shape, ratio, dtype, key_block, device)
    plan = with_relative_keys(
        synthetic_plan(shape, groups, ratio, tokens, coarse=True, device=device), shape, key_block if ratio else 0
    )
    packed = packed_state(plan, shape, groups, tokens, batch, dtype, device)
    query = torch.randn(batch, shape.query_heads, 1, shape.head_dim, device=device, dtype=dtype)
    key, value = torch.randn(2, batch, shape.heads, tokens + 1, shape.head_dim, device=device, dtype=dtype)
    new = [x[:, :, -1:].clone() for x in (key, value)]
    state, layout = packed.state.flatten()
    calls = working(dense_calls(shape, query, key, value))
    trial = interleaved(calls, seconds / 4, device)
    best = min(trial, key=lambda spelling: trial[spelling].median)
    ours = {
        "packed": lambda: torch.ops.apack.attend.default(query, *new, None, state, layout, None),
        "dense": calls[best],
    }
    for name_of_set in instructions:
        by_set = partial(attend_cpu.attend, instructions=INSTRUCTION_SETS.index(name_of_set))
        ours[name_of_set] = partial(by_set, query, *new, None, state, layout)
    if device == "cuda":
        dense = {n: (lambda s, q, k, v, n=n: dense_calls(s, q, k, v)[n]()) for n in calls}
        ours["fp8"] = fp8_call(shape, query, key, value, dense[best])
    before = thread_speedup() if device == "cpu" else 0.0
    timing = interleaved(ours, seconds, device)
    row: Row = {
        "shape": name,
        "plan": "attentionpack, rank 64" if ratio is None else f"ratio={ratio:g}",
        "tokens": tokens,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "ratio": 2 * 2 * batch * shape.heads * shape.head_dim * tokens / held_bytes(packed.state),
        "groups": groups,
        "key_block": 0 if plan.rotation is None else plan.rotation.block,
        "bands_key": named_bands(packed.bands[-2]),
        "bands_value": named_bands(packed.bands[-1]),
        "bands_coarse_key": named_bands(packed.bands[0]) if plan.coarse else "",
        "bands_coarse_value": named_bands(packed.bands[1]) if plan.coarse else "",
        "dense": best,
        "dense_ms": 1e3 * timing["dense"].median,
        "packed_ms": 1e3 * timing["packed"].median,
        "packed_ms_first_decile": 1e3 * timing["packed"].low,
        "packed_ms_last_decile": 1e3 * timing["packed"].high,
        "speedup_vs_dense": timing["dense"].median / timing["packed"].median,
        "speedup_of_first_deciles": timing["dense"].low / timing["packed"].low,
        "share_of_byte_limit": packed.bytes_read / timing["packed"].median / bandwidth,
    }
    for name_of_set in instructions:
        row[f"{name_of_set}_ms"] = 1e3 * timing[name_of_set].median
        row[f"{name_of_set}_ms_first_decile"] = 1e3 * timing[name_of_set].low
        row[f"{name_of_set}_speedup"] = timing["dense"].median / timing[name_of_set].median
    load = Load(shape.query_heads, shape.heads, shape.head_dim, tokens, batch, element_bytes=dtype.itemsize)
    row |= limit_columns(plan, load, device, bandwidth, timing["packed"].median)
    if device == "cpu":
        row["thread_speedup"] = min(before, thread_speedup())
    if "fp8" in timing:
        row["speedup_vs_fp8"] = timing["fp8"].median / timing["packed"].median
    return row


def named_bands(bands: Bands) -> str:
    """Components in 16, 8, 4 and 2 bits."""
    return "+".join(map(str, bands.counts))


def with_relative_keys(plan: Plan, shape: Shape, key_block: int) -> Plan:
    """The plan with keys rotated back to the start of their block of so many slots; 0 leaves it as it is."""
    return replace(plan, rotation=KeyRotation(shape.frequencies, key_block)) if key_block else plan


def rotations_of(positions: Tensor, rotation: KeyRotation) -> Tensor:
    """Rotations of the blocks of slots with these positions `[B, slots]`."""
    return rotations_of_blocks(
        positions, TokenCoordinates.starting_at(positions.new_zeros(len(positions), 1)), rotation
    )


def own_tensors(state: PackedState) -> list[Tensor]:
    """Dense tokens, codes, token scales and positions."""
    ends = [state.first.key, state.first.value, state.tail.key, state.tail.value, state.first_positions]
    streams = [stream for segment in state.segments for stream in (segment.key, segment.value)]
    packed = [x for stream in streams for x in (stream.codes, stream.scale)]
    return [*ends, *packed, *(segment.positions for segment in state.segments)]


def bases_of(state: PackedState) -> list[Tensor]:
    """Bases of all streams."""
    return [x for segment in state.segments for stream in (segment.key, segment.value) for x in stream.basis]


def held_bytes(state: PackedState) -> int:
    """Bytes of a layer's own tensors: bases only where they are a sequence's."""
    return sum(x.nbytes for x in (*own_tensors(state), *(x for x in bases_of(state) if x.dtype == torch.float16)))


def main(
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens in the cache; may be repeated.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Sequences; may be repeated.")] = None,
    ratio: Annotated[
        list[float] | None,
        typer.Option(
            help="Dense 16-bit bytes over packed bytes; may be repeated. Default: 8 (a CPU: 4 and 8), and the preset."
        ),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="attentionpack, instead of a ratio.")] = None,
    groups: Annotated[
        list[int] | None,
        typer.Option(help="Head groups of a ratio's plan; may be repeated. Default: as optimize chooses."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16 or float16; may be repeated.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="A model's name; may be repeated.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer lengths, less time.")] = False,
    key_block: Annotated[
        int, typer.Option(help="Slots that share an anchor, with a ratio; 0: keys as they come.")
    ] = BLOCK,
    instructions: Annotated[
        list[str] | None, typer.Option(help="An instruction set to attend by as well, on a CPU; may be repeated.")
    ] = None,
) -> None:
    """Time packed and dense decode attention."""
    if preset not in (None, "attentionpack"):
        raise typer.BadParameter(f"preset={preset!r} must be 'attentionpack'")
    here = tuple(INSTRUCTION_SETS[i] for i in SETS)
    if unknown := sorted({*(instructions or ())} - {*here}):
        raise typer.BadParameter(f"instructions={unknown} must be of {here} here")
    on_cpu = device == "cpu"
    plans = [None] if preset else ratio or ([4.0, 8.0, None] if on_cpu and not quick else [8.0, None])
    lengths = tokens or ([512, 8_192] if on_cpu or quick else [2_048, 8_192, 32_768, 131_072])
    batches = batch or ([1] if on_cpu or quick else [1, 16])
    dtypes = dtype or (["float32"] if on_cpu and quick else ["float32", "bfloat16"] if on_cpu else ["bfloat16"])
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(device)
    operations = {kind: implementations(device, getattr(torch, kind)) for kind in dtypes}
    print(f"copy {bandwidth / 1e9:.1f} GB/s; {operations}")
    seconds, options = 0.5 if quick else 2.0, (key_block, instructions or ())
    rows = [
        measured(name, n, b, plan, count, getattr(torch, kind), device, bandwidth, seconds, *options)
        for kind in dtypes
        for plan in plans
        for name in shape or SHAPES
        for count in groups or [None]
        if count is None or SHAPES[name].heads % count == 0
        for n in lengths
        for b in batches
    ]
    shown = ("shape", "plan", "tokens", "batch", "dtype", "ratio", "groups", "key_block", "dense_ms", "packed_ms")
    shown += ("speedup_vs_dense", "speedup_of_first_deciles", "speedup_vs_fp8", "share_of_byte_limit")
    shown += tuple(f"{name}_speedup" for name in instructions or ())
    shown += ("limit", "share_of_limit", "predicted_speedup", "thread_speedup")
    print_table(f"decode attention, {device}", [{k: row[k] for k in shown if k in row} for row in rows])
    if json is not None:
        write_json(json, rows, {"copy_bytes_per_second": bandwidth, "operations": operations})


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
