"""Decode attention of branches that share a packed prefix against the same branches with a copy of it each, one query token a branch.

`python benchmarks/shared_prefix.py`: plans, shapes and random codes are those of `attend.py`. Both sides have the same tokens and run in
turns: the newest of them are each branch's own in both, dense in its tail. Their outputs are compared before they are timed.

`shared_prefix_step_ratio`: time with the shared prefix over time with copies. `bytes_ratio`: the same of the bytes of a layer's tokens.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from attend import SHAPES, default_groups, own_tensors, packed_state, synthetic_plan, with_relative_keys
from harness import Row, interleaved, print_table, thread_speedup, write_json
from torch import Tensor

from apack_compile.kernels.format import Bands, StreamBasis
from apack_compile.kernels.ops import implementations
from apack_compile.kernels.state import DenseSegment, PackedState, PackedStream, Segment
from apack_compile.plan.budget import spare_slots
from apack_compile.plan.rotation import BLOCK


def rows_of(x: Tensor, branches: int) -> Tensor:
    """A row for each branch."""
    return x.repeat_interleave(branches, 0)


def copies_of(state: PackedState, branches: int) -> PackedState:
    """Each branch with a copy of all tokens."""

    def copied(segment: Segment) -> Segment:
        key, value = (stream.with_tokens(lambda x: rows_of(x, branches)) for stream in (segment.key, segment.value))
        rotations = None if segment.rotations is None else rows_of(segment.rotations, branches)
        return Segment(segment.kind, key, value, rows_of(segment.positions, branches), rotations)

    first, tail = (
        DenseSegment(rows_of(x.key, branches), rows_of(x.value, branches)) for x in (state.first, state.tail)
    )
    where = rows_of(state.first_positions, branches)
    return replace(state, segments=tuple(map(copied, state.segments)), first=first, first_positions=where, tail=tail)


def branches_of(state: PackedState, branches: int, tokens: int) -> PackedState:
    """Branches behind packed tokens that all of them share; their own text slots are free, their newest tokens in the tail."""
    free = spare_slots(tokens)
    text, used = state.text, state.text.slots - free
    key, value = (x.with_tokens(lambda x: x[:, :, :used].contiguous()) for x in (text.key, text.value))
    shared = Segment(text.kind, key, value, text.positions[:, :used].contiguous(), text.rotations)
    own = copies_of(state, branches)
    slots = own.text.positions[:, used:].contiguous()
    key, value = (x.with_tokens(lambda x: x[:, :, used:].contiguous()) for x in (own.text.key, own.text.value))
    rotations = None if text.rotations is None else own.text.rotations[:, -1 - free // state.block :].contiguous()
    text = Segment(text.kind, key, value, slots, rotations)
    return replace(state, segments=(*state.segments[:-1], shared, text), tail=own.tail)


def lossless(state: PackedState, dtype: torch.dtype) -> PackedState:
    """The same slots with tokens that are kept as they are."""
    _, heads, _, head_dim = state.first.key.shape
    none = torch.empty(0, device=state.first.key.device)

    def kept(segment: Segment) -> Segment:
        streams = []
        for _ in range(2):
            codes = torch.randn(1, heads, segment.slots, head_dim, device=none.device, dtype=dtype)
            streams.append(PackedStream(codes, none.half(), StreamBasis(none, none, none), Bands()))
        return replace(segment, key=streams[0], value=streams[1], rotations=None)

    return replace(state, segments=tuple(map(kept, state.segments)), block=0)


def token_bytes(state: PackedState) -> int:
    """Bytes of a layer's tokens, bases left out."""
    return sum(x.nbytes for x in own_tensors(state))


def measured(
    name: str,
    tokens: int,
    branches: int,
    ratio: float | None,
    dtype: torch.dtype,
    device: str,
    seconds: float,
    key_block: int,
    groups: int | None = None,
) -> Row:
    """One row: a shape, a length, a number of branches; a ratio, or None for the preset lossless."""
    shape, planned = SHAPES[name], ratio or 4.0
    groups = groups or default_groups(shape, planned, dtype, key_block, device)
    plan = with_relative_keys(
        synthetic_plan(shape, groups, planned, tokens, coarse=True, device=device), shape, key_block
    )
    state = packed_state(plan, shape, groups, tokens, 1, dtype, device).state
    state = lossless(state, dtype) if ratio is None else state
    states = {"copies": copies_of(state, branches), "shared": branches_of(state, branches, tokens)}
    query = torch.randn(branches, shape.query_heads, 1, shape.head_dim, device=device, dtype=dtype)
    new = torch.randn(2, branches, shape.heads, 1, shape.head_dim, device=device, dtype=dtype)
    calls = {}
    for side, state in states.items():
        lists = state.flatten()
        calls[side] = lambda lists=lists: torch.ops.apack.attend.default(query, *new, None, *lists, None)
    outputs = [call().float() for call in calls.values()]
    torch.testing.assert_close(*outputs, atol=2e-2 * float(outputs[0].abs().max()), rtol=0)
    copied, shared = outputs
    apart = float((copied - shared).square().mean() / copied.square().mean()) ** 0.5
    if apart > 2e-2:
        raise RuntimeError(f"{name}: the shared prefix gives other results than copies, {apart:.3f} apart")
    before = thread_speedup() if device == "cpu" else 0.0
    timing = interleaved(calls, seconds, device)
    row: Row = {
        "shape": name,
        "plan": "lossless" if ratio is None else f"ratio={ratio:g}",
        "tokens": tokens,
        "branches": branches,
        "dtype": str(dtype).removeprefix("torch."),
        "groups": shape.heads if ratio is None else groups,
        "key_block": 0 if ratio is None else key_block,
    }
    for side in calls:
        row[f"{side}_ms"] = 1e3 * timing[side].median
        row[f"{side}_ms_first_decile"] = 1e3 * timing[side].low
    row["shared_prefix_step_ratio"] = timing["shared"].median / timing["copies"].median
    row["ratio_of_first_deciles"] = timing["shared"].low / timing["copies"].low
    row["bytes_ratio"] = token_bytes(states["shared"]) / token_bytes(states["copies"])
    if device == "cpu":
        row["thread_speedup"] = min(before, thread_speedup())
    return row


def main(
    tokens: Annotated[
        list[int] | None, typer.Option(help="Tokens of the prefix; may be repeated. Default: 8192.")
    ] = None,
    branches: Annotated[list[int] | None, typer.Option(help="Branches; may be repeated. Default: 16.")] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="May be repeated. Default: 4, 8 and the preset.")] = None,
    preset: Annotated[str | None, typer.Option(help="lossless, instead of a ratio.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16 or float16; may be repeated.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="A model's name; may be repeated.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
    seconds: Annotated[float, typer.Option(help="Of each row.")] = 4.0,
    key_block: Annotated[int, typer.Option(help="Slots that share an anchor; 0: keys as they come.")] = BLOCK,
    groups: Annotated[
        int | None, typer.Option(help="Head groups of a ratio's plan. Default: as optimize chooses.")
    ] = None,
) -> None:
    """Time attention over a shared prefix and over copies of it."""
    if preset not in (None, "lossless"):
        raise typer.BadParameter(f"preset={preset!r} must be 'lossless'")
    plans = [None] if preset else ratio or [4.0, 8.0, None]
    torch.manual_seed(0)
    kinds = dtype or (["float32"] if device == "cpu" else ["bfloat16"])
    rows = [
        measured(name, n, count, plan, getattr(torch, kind), device, seconds, key_block, groups)
        for kind in kinds
        for plan in plans
        for name in shape or SHAPES
        for n in tokens or (8_192,)
        for count in branches or (16,)
    ]
    print_table(f"attention of branches, {device}", rows)
    if json is not None:
        operations = {kind: implementations(device, getattr(torch, kind)) for kind in kinds}
        write_json(json, rows, {"operations": operations, "threads": torch.get_num_threads()})


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
