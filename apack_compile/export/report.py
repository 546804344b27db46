"""What is packed in a program, read off the program itself, so that it is the same after a save and a load."""

import copy
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, fx
from torch.export import ExportedProgram

from apack_compile.cache.accounting import DENSE_ELEMENT_BYTES, more_than_dense, storage_bytes
from apack_compile.checks import counted
from apack_compile.export.find import drop_checks, find_caches
from apack_compile.export.state import BASES, CURSOR, POSITIONS, ROOT, ROTATIONS
from apack_compile.kernels.ops import implementations
from apack_compile.kernels.state import check_version
from apack_compile.passes.buffers.pairs import BufferPair
from apack_compile.passes.graph.nodes import bind, default_overload, op_name

NOT_PACKED = "optimize has not packed it"


@dataclass(frozen=True)
class PackedLine:
    """One packed cache: slots of a sequence, 16-bit dense bytes, bytes held, bytes of its bases."""

    name: str
    slots: int
    dense_bytes: int
    packed_bytes: int
    basis_bytes: int


@dataclass(frozen=True)
class LeftLine:
    """One cache that is dense, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class ProgramReport:
    """Packed and dense caches of a program, all bytes of the packed ones, and what serves each operation.

    dense_bytes: a 16-bit dense buffer of each packed cache; sequence_bytes: what is held instead, with slots' positions and rotations;
    model_bytes: bases; ratio: dense_bytes / sequence_bytes. keys: how packed keys are stored. notes: what a reader must know.
    """

    packed: tuple[PackedLine, ...]
    left: tuple[LeftLine, ...]
    dense_bytes: int
    sequence_bytes: int
    model_bytes: int
    ratio: float
    keys: str
    operations: dict[str, str]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """This report as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"apack-compile: {counted(len(self.packed), 'cache')} packed, {len(self.left)} dense",
            f"{self.dense_bytes:,} bytes dense (16-bit), {self.sequence_bytes:,} packed ({self.ratio:.2f}x), "
            f"{self.model_bytes:,} of bases",
        ]
        if self.packed:
            lines.append("; ".join(f"{operation}: {serves}" for operation, serves in self.operations.items()))
            lines.append(f"packed keys: {self.keys}")
        lines += [
            f"packed  {line.name}: {line.slots} slots, {line.dense_bytes:,} bytes dense, {line.packed_bytes:,} packed"
            for line in self.packed
        ]
        lines += [f"dense   {line.name}: {line.reason}" for line in self.left]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def program_report(program: ExportedProgram | fx.GraphModule) -> ProgramReport:
    """The report of a program, packed or not; raises ValueError for one whose packed state this version does not read."""
    gm = program.module(check_guards=False) if isinstance(program, ExportedProgram) else program
    # the same tensors, another graph
    gm = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    drop_checks(gm.graph)
    for node in gm.graph.nodes:
        if op_name(node) == "apack::append_at":
            check_version(bind(node, default_overload(node))["layout"])
    buffers = {name: buffer for name, buffer in gm.named_buffers() if name.startswith(f"{ROOT}.")}
    by_owner: dict[str, dict[str, Tensor]] = {}
    for name, buffer in buffers.items():
        owner, _, last = name.rpartition(".")
        by_owner.setdefault(owner.removeprefix(f"{ROOT}."), {})[last] = buffer
    packed = tuple(_line(name, held) for name, held in by_owner.items() if CURSOR in held)
    shared = storage_bytes(
        t for held in by_owner.values() if POSITIONS[0] in held or POSITIONS[1] in held for t in held.values()
    )
    found, unread = find_caches(gm)
    left = [(m.name, NOT_PACKED) if isinstance(m, BufferPair) else (str(m.layer), m.reason) for m in found]
    left += unread.items()
    dense, held_bytes = sum(line.dense_bytes for line in packed), sum(line.packed_bytes for line in packed) + shared
    cursor = next((held[CURSOR] for held in by_owner.values() if CURSOR in held), None)
    return ProgramReport(
        packed,
        tuple(LeftLine(name, reason) for name, reason in left),
        dense_bytes=dense,
        sequence_bytes=held_bytes,
        model_bytes=sum(line.basis_bytes for line in packed),
        ratio=dense / held_bytes if held_bytes else 1.0,
        keys=_keys(by_owner) if packed else "",
        operations={} if cursor is None else _operations(gm, cursor.device.type),
        notes=tuple(filter(None, [more_than_dense(held_bytes, dense)])),
    )


def _line(name: str, held: dict[str, Tensor]) -> PackedLine:
    """The line of one cache."""
    codes = [held["key_codes"], held["value_codes"]]
    means = [held.get("key_mean"), held.get("value_mean")]
    widths = [c.shape[1] * c.shape[3] if m is None else m.numel() for c, m in zip(codes, means, strict=True)]
    slots = codes[0].shape[2] + (held["tail_key"].shape[2] if "tail_key" in held else 0)
    bases = [tensor for part, tensor in held.items() if part in BASES]
    rest = [tensor for part, tensor in held.items() if part not in BASES]
    dense = codes[0].shape[0] * slots * sum(widths) * DENSE_ELEMENT_BYTES
    return PackedLine(name, slots, dense, storage_bytes(rest), storage_bytes(bases))


def _keys(by_owner: dict[str, dict[str, Tensor]]) -> str:
    """Whether packed keys are rotated back."""
    rotated = any(ROTATIONS[0] in held for held in by_owner.values())
    return "rotated back to the start of their block of slots" if rotated else "stored as the graph makes them"


def _operations(gm: fx.GraphModule, device: str) -> dict[str, str]:
    """What serves the operations of a program for the dtype of its weights."""
    dtype = next((p.dtype for p in gm.parameters() if p.is_floating_point()), None)
    served = {} if dtype is None else implementations(device, dtype)
    return {name: served[name] for name in ("append", "attend") if name in served}
