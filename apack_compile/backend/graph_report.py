"""What `report(log)` returns: every attention and every cache in the graphs of a `torch.compile`."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from apack_compile.backend.graph_log import GraphLog
from apack_compile.cache.accounting import more_than_dense
from apack_compile.checks import counted
from apack_compile.passes import GraphRecord, MatchRecord

HOW_TO_PACK = (
    "to pack them: options={'own_cache': True} for static buffers of the compiled module, or "
    "apack_compile.optimize(model) for a transformers model"
)


@dataclass(frozen=True)
class GraphLine:
    """An attention or a cache of a graph: `status` is "rewritten", "packed", "shared heads" or "unchanged"."""

    graph: int
    layer: str
    what: str
    status: str
    reason: str


@dataclass(frozen=True)
class GraphReport:
    """Attentions and caches of every graph, the compilers they went to, what computes other operations, bytes of what own_cache has packed
    by now, and notes."""

    graphs: int
    compilers: tuple[str, ...]
    operations: dict[str, str]
    lines: tuple[GraphLine, ...]
    bytes: dict[str, Any] | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """This report as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        compiled = "; ".join(self.compilers) or "nothing was compiled yet"
        graphs = counted(self.graphs, "graph")
        lines = [f'apack-compile: torch.compile(backend="attentionpack"), {graphs}: {compiled}']
        lines += [f"{operation}: {serves}" for operation, serves in self.operations.items()]
        lines.append(f"{'graph':>5}  {'layer':<32} {'what':<28} {'status':<12} reason")
        lines += [f"{n.graph:>5}  {n.layer:<32} {n.what:<28} {n.status:<12} {n.reason}" for n in self.lines]
        if self.bytes:
            held = self.bytes
            lines.append(
                f"packed buffers: {counted(held['layers'], 'layer')} of {held['capacity']} slots, {held['tokens']} tokens held; "
                f"{held['buffer_bytes']:,} bytes before ({held['dense_bytes']:,} in 16 bits), {held['packed_bytes']:,} now "
                f"({held['ratio']:.2f}x of 16 bits), {held['released_bytes']:,} given back, {held['model_bytes']:,} of shared bases"
            )
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def build_graph_report(log: GraphLog) -> GraphReport:
    """The report of a log."""
    lines = tuple(line for i, graph in enumerate(log.graphs) for line in lines_of(i, graph))
    held = [found for caches in log.caches if (found := caches.report()) is not None]
    notes = [note for caches in held for note in caches["notes"]]
    sizes = total(held)
    if sizes and (more := more_than_dense(sizes["packed_bytes"], sizes["dense_bytes"])):
        notes.append(more)
    unchanged = [line for line in lines if line.status == "unchanged" and line.what.endswith("cache")]
    if unchanged:
        size = max(stock_bytes(graph) for graph in log.graphs)
        known = f" of {size:,} bytes" if size else ""
        notes.append(f"dense caches{known} stay as they are, their bytes are unchanged; {HOW_TO_PACK}")
    if log.caches and not held:
        notes.append("own_cache: nothing is packed yet; the first decode call over enough tokens does it")
    compilers = tuple(dict.fromkeys(log.compilers))
    return GraphReport(
        len(log.graphs), compilers, linear_operation(log.graphs), lines, sizes, tuple(dict.fromkeys(notes))
    )


def lines_of(number: int, graph: GraphRecord) -> Iterator[GraphLine]:
    """What a graph's record says, attentions first."""
    packed = [match for match in graph.static_buffers if match.reason is None]
    own = {name for match in packed for name in nodes_of(match)}
    shared = {match.node for match in graph.shared_heads}
    refused = {
        name: match.reason
        for match in graph.static_buffers
        if match.reason is not None
        for name in match.details["updates"]  # type: ignore[attr-defined]
    }
    for site in graph.sites:
        if site.node in own:
            continue
        if site.reason is None:
            yield GraphLine(number, site.layer or "", "attention", "rewritten", "")
        elif site.node in shared:
            yield GraphLine(number, site.layer or "", "attention", "shared heads", "dense, without repeated heads")
        else:
            yield GraphLine(number, site.layer or "", "attention", "unchanged", site.reason)
    for match in packed:
        what = f"keys and values ({match.details['kind']})"
        yield GraphLine(number, match.layer or "", what, "packed", "from the first decode call on; dense in a prefill")
    for update in graph.cache_updates:
        if update.node not in own:
            reason = refused.get(update.node, update.reason) or ""
            what = f"{update.details.get('stream', '')} cache".strip()
            yield GraphLine(number, update.layer or "", what, "unchanged", reason)


def linear_operation(graphs: Sequence[GraphRecord]) -> dict[str, str]:
    """How many linear layers oneDNN computes, in the graph that has most of them; nothing where there are none."""
    most = max((len(graph.linear_layers) for graph in graphs), default=0)
    return {"linear": f"oneDNN for {counted(most, 'layer')} in float32 (MKL is slower here)"} if most else {}


def stock_bytes(graph: GraphRecord) -> int:
    """Bytes of a graph's dense caches whose size is known, those with a packed form left out."""
    own = {name for match in graph.static_buffers if match.reason is None for name in nodes_of(match)}
    sizes = {u.details["state"]: u.details["bytes"] for u in graph.cache_updates if u.details and u.node not in own}
    return sum(size for size in sizes.values() if isinstance(size, int))


def nodes_of(match: MatchRecord) -> list[Any]:
    """The attentions and both updates of a packed pair."""
    return [name for kind in ("attentions", "updates") for name in match.details[kind]]  # type: ignore[attr-defined]


def total(held: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Bytes of several torch.compile calls together."""
    if not held:
        return None
    added = {name: sum(one[name] for one in held) for name in held[0] if name.endswith("_bytes") or name == "layers"}
    largest = {name: max(one[name] for one in held) for name in ("tokens", "capacity")}
    return {**added, **largest, "ratio": added["dense_bytes"] / added["packed_bytes"]}
