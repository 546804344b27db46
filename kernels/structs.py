"""The structures of kernels/csrc/arguments.h, field by field, and what packs them."""

from collections.abc import Iterator
from ctypes import Array, Structure, c_double, c_int64, c_void_p, sizeof
from struct import Struct

from apack_compile.kernels.format import BANDS
from apack_compile.kernels.state import MAX_SEGMENTS

STRIDES = c_int64 * 3


class Source(Structure):
    """One stream of one segment: packed codes, or heads as they are. Strides in elements."""

    _fields_ = (
        ("data", c_void_p),
        *((name, c_int64) for name in ("dtype", "batch_stride", "group_stride", "token_stride", "groups")),
        *((name, c_void_p) for name in ("scale", "mean", "decoder", "step")),
        ("basis_dtype", c_int64),
        ("basis_batch", c_int64),
        ("bands", c_int64 * len(BANDS)),
    )


class Segment(Structure):
    """Slots of one kind, `[batch, slots]`, and where their keys and values are; a batch of 1 is that of all sequences."""

    _fields_ = (("slots", c_int64), ("batch", c_int64), ("positions", c_void_p), ("key", Source), ("value", Source))


class State(Structure):
    """What stays where it is from step to step: first, packed segments, tail."""

    _fields_ = (("segments", Segment * (2 + MAX_SEGMENTS)),)


class Importance(Structure):
    """Importance of a segment's slots, and how the newest token's attention goes into it."""

    _fields_ = (("known", c_void_p), ("keep", c_double), ("add", c_double))


class Rotations(Structure):
    """How the keys of each block of slots were rotated back."""

    _fields_ = (("data", c_void_p), *((name, c_int64) for name in ("batch", "blocks", "pairs", "block")))


class Attend(Structure):
    """One attend."""

    _fields_ = (
        *((name, c_int64) for name in ("threads", "batch", "heads", "query_heads", "rows", "new_tokens")),
        ("head_dim", c_int64),
        ("value_dim", c_int64),
        ("query", c_void_p),
        ("query_dtype", c_int64),
        ("query_strides", STRIDES),
        ("scale", c_double),
        ("out", c_void_p),
        ("cursor", c_void_p),
        ("mask", c_void_p),
        ("mask_is_bool", c_int64),
        ("mask_strides", STRIDES),
        ("mask_length", c_int64),
        ("tiers", c_void_p),
        ("partial", c_int64),
        ("importance", Importance * 2),
        ("key", c_void_p),
        ("value", c_void_p),
        ("key_dtype", c_int64),
        ("key_strides", STRIDES),
        ("value_dtype", c_int64),
        ("value_strides", STRIDES),
        ("rotations", Rotations * MAX_SEGMENTS),
    )


class Side(Structure):
    """K or V of an append: the new tokens, the tail, and the text stream that takes what leaves it."""

    _fields_ = (
        ("fresh", c_void_p),
        ("dtype", c_int64),
        ("strides", STRIDES),
        ("width", c_int64),
        ("tail", c_void_p),
        ("tail_dtype", c_int64),
        ("tail_strides", STRIDES),
        ("packed", Source),
    )


class Quantizer(Structure):
    """How coefficients become levels."""

    _fields_ = (("unit", c_double * len(BANDS)), ("least_scale", c_double), ("greatest_half", c_double))


class Append(Structure):
    """One append."""

    _fields_ = (
        *((name, c_int64) for name in ("threads", "batch", "heads", "new_tokens", "tail_slots", "capacity")),
        ("cursor", c_void_p),
        ("quantizer", Quantizer),
        ("sides", Side * 2),
        ("rotations", Rotations),
    )


class Encode(Structure):
    """Tokens to a stream of as many slots."""

    _fields_ = (
        *((name, c_int64) for name in ("threads", "batch", "tokens", "width")),
        ("data", c_void_p),
        ("dtype", c_int64),
        ("strides", STRIDES),
        ("quantizer", Quantizer),
        ("to", Source),
    )


class Restored(Structure):
    """K or V of an unpack: the new tokens, and where all of them go."""

    _fields_ = (("fresh", c_void_p), ("dtype", c_int64), ("strides", STRIDES), ("width", c_int64), ("out", c_void_p))


class Unpack(Structure):
    """One unpack."""

    _fields_ = (
        *((name, c_int64) for name in ("threads", "batch", "heads", "new_tokens", "tokens")),
        ("cursor", c_void_p),
        ("sides", Restored * 2),
        ("rotations", Rotations * MAX_SEGMENTS),
        ("interleaved_pairs", c_int64),
    )


STRUCTURES = (
    Source, Segment, State, Importance, Rotations, Attend, Side, Quantizer, Append, Encode, Restored, Unpack,
)  # fmt: skip


def places(kind: type[Structure]) -> dict[str, int]:
    """Offset of `Kind.field` of each field, and size of `Kind`, in bytes."""
    fields = {f"{kind.__name__}.{field[0]}": getattr(kind, field[0]).offset for field in kind._fields_}
    return {kind.__name__: sizeof(kind), **fields}


def packer(kind: type[Structure]) -> Struct:
    """What packs a structure's fields, in order, in a tenth of the time that ctypes takes to set them."""
    return Struct("=" + "".join(_formats(kind)))


def _formats(kind: type) -> Iterator[str]:
    """The formats of a type's fields, those of nested ones in their place: every field takes eight bytes."""
    if issubclass(kind, Structure):
        for field in kind._fields_:
            yield from _formats(field[1])
    elif issubclass(kind, Array):
        for _ in range(int(kind._length_)):  # type: ignore[call-overload]
            yield from _formats(kind._type_)  # type: ignore[arg-type]
    else:
        yield "d" if kind is c_double else "q"


ATTEND, SEGMENT, APPEND, ENCODE, UNPACK = map(packer, (Attend, Segment, Append, Encode, Unpack))
