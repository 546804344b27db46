"""What `report(model)` returns: every attention layer, every byte."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apack_compile.backend.graph_report import linear_operation
from apack_compile.cache.accounting import DENSE_ELEMENT_BYTES, less_than_asked, more_than_dense
from apack_compile.checks import counted, size
from apack_compile.files import check_place
from apack_compile.generate.decode_step import why_not_compiled
from apack_compile.generate.quantize import plain_layers, quantized_layers, told
from apack_compile.kernels.ops import implementations
from apack_compile.models.device_memory import memory_bytes
from apack_compile.models.offload import computing_device, is_offloaded
from apack_compile.models.weights import weight_bytes
from apack_compile.models.wrappers import adapters_of
from apack_compile.passes import GraphRecord
from apack_compile.plan.coarse_rule import LEAST_RATIO
from apack_compile.plan.file import versions
from apack_compile.plan.layer_bytes import LayerBytes, layer_bytes
from apack_compile.plan.rotation import KeyRotation
from apack_compile.plan.signature import kv_heads
from apack_compile.report_figure import figure_of
from apack_compile.report_page import fragment_of, page_of

PACKED_STATUS = ("rewritten", "packed", "skipped")
# A graph of a single layer does not name it.
ONE_BY_ONE = "decode is compiled layer by layer: every site was rewritten, no graph names its layer"

WITHOUT_NATIVE = (
    "the compiled operations for CPUs are missing: results are the same, packing and attention are slower; install a C++ compiler and "
    "install apack-compile again"
)


@dataclass(frozen=True)
class LayerLine:
    """One layer of the model: `status` is "rewritten", "packed" (not compiled yet), "dense", "no keys" or "skipped"."""

    layer: int
    kind: str
    status: str
    reason: str


@dataclass(frozen=True)
class Room:
    """How many caches as large as the newest one fit beside the weights, packed, or dense in 16 bits; memory: the device's bytes."""

    device: str
    memory: int
    packed: int
    dense: int


@dataclass(frozen=True, repr=False)
class Report:
    """Layers, graphs, compile choice, implementation of each operation, bytes of the last cache, and notes."""

    setting: str
    compile: str
    compile_reason: str
    operations: dict[str, str]
    calibrated_on: str | None
    weighed_by: str | None
    keys: str
    head_groups: str
    quantized_layers: int
    quantized_by: dict[str, int]
    weight_bytes: int
    layers: tuple[LayerLine, ...]
    graphs: tuple[dict[str, Any], ...]
    bytes: dict[str, Any] | None
    room: Room | None
    layer_bytes: tuple[LayerBytes, ...]
    planned_for: str
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """This report as plain values."""
        return asdict(self)

    def save(self, path: str | PathLike) -> None:
        """Write this report to one HTML file that needs no other; raises ValueError unless the name ends in .html."""
        if Path(path).suffix != ".html":
            raise ValueError(f"path={str(path)!r} must end in .html")
        check_place(Path(path))
        Path(path).write_text(page_of(self.to_dict()), encoding="utf-8")

    def plot(self) -> Any:
        """A matplotlib figure: bytes of the last cache, and of a token in each layer. Raises ImportError without matplotlib."""
        return figure_of(self.to_dict())

    def _repr_html_(self) -> str:
        return fragment_of(self.to_dict())

    def __repr__(self) -> str:
        packed = sum(line.status in PACKED_STATUS for line in self.layers)
        said = [f"{self.setting}: {packed} of {counted(len(self.layers), 'layer')} packed"]
        if self.bytes:
            dense, held = size(self.bytes["dense_bytes"]), size(self.bytes["sequence_bytes"])
            said.append(f"{self.bytes['tokens']:,} tokens in {held} instead of {dense} ({self.bytes['ratio']:.2f}x)")
        said += [counted(len(self.notes), "note")] if self.notes else []
        return f"<apack-compile report, {', '.join(said)}; print it for all of it>"

    def __str__(self) -> str:
        lines = [f"apack-compile: {self.setting}; decode: {self.compile} ({self.compile_reason})"]
        lines.append("; ".join(f"{operation}: {serves}" for operation, serves in self.operations.items()))
        if any("(native:" in serves for serves in self.operations.values()):
            lines.append(WITHOUT_NATIVE)
        if self.calibrated_on:
            weighed = f", weighed by {self.weighed_by}" if self.weighed_by else ""
            lines.append(f"bases calibrated on: {self.calibrated_on}{weighed}")
        if self.keys:
            lines.append(f"packed keys: {self.keys}")
        if self.head_groups:
            lines.append(f"head groups: {self.head_groups}")
        if self.quantized_layers:
            lines.append(f"linear layers of the language model: {told(self.quantized_by)}")
        lines.append(f"{'layer':>5}  {'kind':<20} {'status':<10} reason")
        lines += [f"{line.layer:>5}  {line.kind:<20} {line.status:<10} {line.reason}" for line in self.layers]
        if self.bytes:
            lines.append(
                f"last cache: {self.bytes['tokens']} tokens, {self.bytes['dense_bytes']:,} bytes dense (16-bit), "
                f"{self.bytes['sequence_bytes']:,} packed ({self.bytes['ratio']:.2f}x), "
                f"{self.bytes['model_bytes']:,} of bases shared by all requests "
                f"({self.bytes['model_bytes'] / self.weight_bytes:.1%} of the weights' {self.weight_bytes:,})"
            )
            if coarse := self.bytes["coarse"]:
                lines.append(
                    f"coarse tokens: in each layer, the {coarse['share']:.0%} of its {coarse['modality']} tokens that are "
                    "expected to matter least"
                )
        if self.room:
            lines.append(
                f"caches as large as the newest one that fit in {size(self.room.memory)} of {self.room.device} beside the weights: "
                f"{self.room.packed:,} packed, {self.room.dense:,} dense (16-bit); what a forward pass needs is not counted"
            )
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def build_report(model: nn.Module, session: Any) -> Report:
    """The report of a session."""
    graphs = tuple(record.to_dict() for record in session.graphs)
    held, cache_notes = session.last.held_now() or (None, [])
    rewritten, refused = sites_by_layer(session.graphs)
    sites = [site for graph in session.graphs for site in graph.sites if site.packed]
    quantized, plain = quantized_layers(model), plain_layers(model)
    calibrated_on = None if session.calibration is None else session.calibration.inputs
    stopped = None if session.inner is None else why_not_compiled(model)
    inner = session.inner if stopped is None else None
    unnamed = bool(sites) and all(site.reason is None and layer_of(site.layer) is None for site in sites)
    return Report(
        setting=setting_of(session) + (f", {session.source.ranks}" if session.source.ranks.count > 1 else ""),
        compile=inner or "none",
        compile_reason=session.inner_reason if stopped is None else f"{stopped}; {session.inner_reason}",
        operations=implementations(computing_device(model).type, model.dtype) | linear_operation(session.graphs),
        calibrated_on=session.plan.provenance.calibrated_on if session.plan else calibrated_on,
        weighed_by=weights_of(session),
        keys=keys_of(session),
        head_groups=head_groups_of(session),
        quantized_layers=quantized.total(),
        quantized_by=dict(quantized) | ({"not quantized": plain} if quantized and plain else {}),
        weight_bytes=weight_bytes(model),
        layers=tuple(layer_line(kind, rewritten, refused, inner, unnamed) for kind in session.kinds),
        graphs=graphs,
        bytes=held,
        room=room_beside(model, held),
        **planned_of(session, model),
        notes=(
            *cache_notes,
            *notes_of(session, held),
            *adapter_notes(model, session),
            *size_notes(session.ratio, held, model.dtype),
        ),
    )


def room_beside(model: nn.Module, held: Mapping[str, Any] | None) -> Room | None:
    """Caches as large as the newest one that fit beside the weights; None where no cache was seen, or the memory is not known."""
    device = computing_device(model)
    memory = None if held is None or not held["sequence_bytes"] or is_offloaded(model) else memory_bytes(device)
    if memory is None:
        return None
    left = memory - weight_bytes(model)
    packed, dense = (left - held["model_bytes"]) // held["sequence_bytes"], left // held["dense_bytes"]
    return Room("the CPU's memory" if device.type == "cpu" else str(device), memory, max(packed, 0), max(dense, 0))


def planned_of(session: Any, model: nn.Module) -> dict[str, Any]:
    """Bytes of a token in each layer, by the plan given, the preset's, or the newest one that was made; and which prompts it is for."""
    source = session.source
    if source.given is not None or source.presets:
        plan = source.whole_plan(1, 0.0)
        shapes = {layer: kv_heads(model, layer) for layer in plan.every_layer}
        return {"layer_bytes": layer_bytes(plan, 0.0, shapes), "planned_for": "every prompt"}
    made = [key for key in source.made if key[0] == next(iter(source.layers))]
    if not made:
        return {"layer_bytes": (), "planned_for": ""}
    _, tokens, share = made[-1]
    vision = f", {share:.0%} of them vision" if share else ""
    plan = source.whole_plan(tokens, share)
    return {"layer_bytes": layer_bytes(plan, share), "planned_for": f"prompts of about {tokens:,} tokens{vision}"}


def setting_of(session: Any) -> str:
    """What optimize was asked for."""
    if session.plan is not None:
        path = session.plan.provenance.path
        return "plan=Plan, not loaded from a file" if path is None else f"plan=Plan.load({path!r})"
    return f"preset={session.config.preset!r}" if session.config.preset else f"ratio={session.config.ratio:g}"


def keys_of(session: Any) -> str:
    """How keys are packed: rotated back or as they come, and why; empty where there is no choice or it is still open."""
    if session.plan is None:
        calibrated = session.ratio is not None and session.calibration is not None
        return by_window(session.calibration.rotation_reasons) if calibrated else ""
    return by_window({window: rotation_of(part.rotation) for window, part in session.plan.by_window.items()})


def rotation_of(rotation: KeyRotation | None) -> str:
    """How a plan's keys are packed."""
    if rotation is None:
        return "stored as they are, says the plan"
    said = f"rotated back to the start of their {rotation.block} slots"
    return (
        said if rotation.coordinates is None else f"{said}, each pair by one of {rotation.coordinate_count} coordinates"
    )


def by_window(said: Mapping[int | None, str]) -> str:
    """What is said of the layers with each window, once where it is the same."""
    if len(set(said.values())) < 2:
        return next(iter(said.values()), "")
    names = {window: "full attention" if window is None else f"window of {window}" for window in said}
    return "; ".join(f"{names[window]}: {text}" for window, text in said.items())


def head_groups_of(session: Any) -> str:
    """How many groups of heads share bases, and why; empty where no bases were calibrated."""
    if session.plan is not None:
        counts = {window: f"{part.groups}, says the plan" for window, part in session.plan.by_window.items()}
        return by_window(counts)
    if session.ratio is None or session.calibration is None:
        return ""
    groups = session.calibration.groups
    return f"{groups.count}; {groups.reason}"


def sites_by_layer(graphs: list[Any]) -> tuple[set[int], dict[int, str]]:
    """Layers whose site was rewritten in some graph, and the reasons of those left, by layer."""
    rewritten: set[int] = set()
    refused: dict[int, str] = {}
    for graph in graphs:
        for site in graph.sites:
            layer = layer_of(site.layer)
            if layer is None or (site.reason is not None and not site.packed):
                continue
            if site.reason is None:
                rewritten.add(layer)
            else:
                refused[layer] = site.reason
    return rewritten, refused


def layer_of(path: str | None) -> int | None:
    """The layer number in a module path such as model.layers.3.self_attn."""
    numbers = [int(part) for part in (path or "").replace("[", ".").replace("]", ".").split(".") if part.isdigit()]
    return numbers[-1] if numbers else None


def layer_line(kind: Any, rewritten: set[int], refused: dict[int, str], inner: str | None, unnamed: bool) -> LayerLine:
    """The line of one layer."""
    if kind.reason is not None:
        return LayerLine(kind.layer, kind.layer_type, "dense" if kind.has_keys else "no keys", kind.reason)
    if kind.layer in refused and kind.layer not in rewritten:
        return LayerLine(kind.layer, kind.layer_type, "skipped", refused[kind.layer])
    if kind.layer in rewritten:
        return LayerLine(kind.layer, kind.layer_type, "rewritten", "")
    not_yet = ONE_BY_ONE if unnamed else "no decode step compiled yet"
    reason = "decode is not compiled" if inner is None else not_yet
    return LayerLine(kind.layer, kind.layer_type, "packed", reason)


def notes_of(session: Any, held: dict[str, Any] | None) -> list[str]:
    """What a reader of the report must know."""
    notes = [] if session.last.unused is None else [f"the last generate used no packed cache: {session.last.unused}"]
    if session.last.dense_passes:
        passes = "1 forward pass" if session.last.dense_passes == 1 else f"{session.last.dense_passes} forward passes"
        notes.append(
            f"{passes} since the last one with a packed cache had none: the results are the dense model's; "
            "pass the model a cache from new_cache(model)"
        )
    if session.replaced:
        notes.append(
            "optimize replaced a generate that a user had put on this model: that one is not called until restore; put it there "
            "after optimize"
        )
    notes += [] if session.outdated is None else [session.outdated]
    eager = sorted({kind.layer_type for kind in session.kinds if not kind.compileable})
    if eager:
        notes.append(
            f"{', '.join(eager)}: a step over the cache of these layers cannot be compiled: decode runs eagerly"
        )
    notes += stock_cache_notes(session.graphs)
    if session.plan is not None:
        notes += version_notes(session.plan.provenance.versions)
    ratio, calibration = session.ratio, session.calibration
    if ratio is None or calibration is None:
        return notes
    if calibration.without_gradients is not None:
        notes.append(
            "calibrated without gradients, so all components of a stream count alike, which costs quality: "
            f"{calibration.without_gradients}"
        )
    elif ratio >= LEAST_RATIO:
        missing = [name for name in session.config.coarse if name not in calibration.rules]
        if missing:
            what = " and ".join(missing)
            notes.append(f"no coarse {what} tokens: calibration saw too few to tell which of them matter less")
    return notes


def weights_of(session: Any) -> str | None:
    """What says how much components matter; None where nothing does, and for a given plan."""
    calibration = None if session.plan else session.calibration
    return None if calibration is None or calibration.without_gradients is not None else calibration.weighed_by


def size_notes(ratio: float | None, held: Mapping[str, Any] | None, dtype: torch.dtype) -> list[str]:
    """A note where the last cache holds more than a dense one, or clearly less than the ratio asks for."""
    if held is None:
        return []
    more = more_than_dense(held["sequence_bytes"], held["dense_bytes"], held["parts"])
    if more is not None:
        wider = dtype.itemsize // DENSE_ELEMENT_BYTES
        own = f"; in {dtype}, as the model is, a dense one has {held['dense_bytes'] * wider:,}" if wider > 1 else ""
        return [f"{more}, at {held['tokens']} tokens{own}"]
    less = None if ratio is None else less_than_asked(ratio, held)
    return [] if less is None else [less]


def adapter_notes(model: nn.Module, session: Any) -> list[str]:
    """A note where bases were calibrated with other adapters than the model has now."""
    if (session.plan is None and session.calibration is None) or adapters_of(model) == session.adapters:
        return []
    what = "pass a plan made with these" if session.plan is not None else "call calibrate again"
    return [
        f"adapters were added, removed or switched after the bases were calibrated: they fit the model before it; {what}"
    ]


def stock_cache_notes(graphs: Sequence[GraphRecord]) -> list[str]:
    """A note for each kind of stock cache update in the compiled graphs, and for each that is no known update."""
    notes: Counter[str] = Counter()
    for update in (update for graph in graphs for update in graph.cache_updates):
        kind = update.details.get("kind")
        notes[f"updated by {kind}, bytes unchanged" if kind else f"left as it is: {update.reason}"] += 1
    return [f"stock cache {what} ({counted(count, 'stream')})" for what, count in notes.items()]


def version_notes(made_with: Mapping[str, str]) -> list[str]:
    """A note where a plan was made with other versions than these."""
    here = versions()
    other = [f"{name} {made_with.get(name)}, here {here[name]}" for name in here if made_with.get(name) != here[name]]
    return [f"the plan was made with other versions: {'; '.join(other)}"] if other else []
