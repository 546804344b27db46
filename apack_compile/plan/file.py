"""A plan as one safetensors file (docs/format.md)."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from apack_compile.files import check_place
from apack_compile.kernels.format import Bands, StreamBasis
from apack_compile.plan.check import check_plan, uses_bases
from apack_compile.plan.coarse_rule import CoarseRule
from apack_compile.plan.plan import LayerPlan, Plan, Provenance, StreamPlan
from apack_compile.plan.presets import PRESETS, AttentionPackOptions, AVLOptions
from apack_compile.plan.presets.base import Preset
from apack_compile.plan.ranks import ALONE, Ranks, rank_here
from apack_compile.plan.rotation import KeyRotation
from apack_compile.plan.tensor_file import FileKind, read_file, write_file
from apack_compile.plan.tiers import TierRule
from apack_compile.version import __version__

# Of one plan, and of one for each rank of tensor parallelism; both without windows.
WITHOUT_WINDOWS = ("4", "5")
# These had the numbers of tiers, without the preset that they are of.
WITHOUT_PRESET = (*WITHOUT_WINDOWS, "6")
PLAN = FileKind("plan", "7", "Plan.save", WITHOUT_PRESET)
FREQUENCIES = "turn.frequencies"
COORDINATES = "turn.coordinates"
COARSE = "coarse."
SCALARS = ("tail_slots", "first_tokens", "groups", "separates_vision")


def save_plan(plan: Plan, path: str | os.PathLike) -> None:
    """Write a plan to one file, whole or not at all; raises ValueError for a plan that no cache can use."""
    check_plan(plan, "plan")
    path = Path(path)
    check_place(path)
    if plan.ranks.count == 1:
        write(path, values_of(plan), tensors_of(plan))
        return
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        # POSIX alone, as torch.distributed's tensor parallelism
        import fcntl

        # all ranks save to one file: each adds its part to those that are there
        fcntl.flock(lock, fcntl.LOCK_EX)
        values, tensors = other_ranks(plan, path)
        values["ranks"][str(plan.ranks.rank)] = values_of(plan)
        part = {f"rank{plan.ranks.rank}.{name}": tensor for name, tensor in tensors_of(plan).items()}
        write(path, values, tensors | part)


def other_ranks(plan: Plan, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a plan file holds of this plan for other ranks; nothing where there is none of as many ranks."""
    nothing: tuple[dict[str, Any], dict[str, Tensor]] = ({"count": plan.ranks.count, "ranks": {}}, {})
    try:
        metadata, tensors = read(path)
        values = json.loads(metadata["plan"])
    except (FileNotFoundError, ValueError):
        return nothing
    if metadata.get("sha256") != digest(metadata["plan"], tensors):
        return nothing
    if metadata[PLAN.version_key] != PLAN.version or values.get("count") != plan.ranks.count:
        return nothing
    own, wanted = str(plan.ranks.rank), ids_of(values_of(plan))
    ranks = {rank: part for rank, part in values["ranks"].items() if rank != own and ids_of(part) == wanted}
    kept = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0].removeprefix("rank") in ranks}
    return {"count": plan.ranks.count, "ranks": ranks}, kept


def ids_of(values: Mapping[str, Any]) -> list[str | None]:
    """Which plans a rank's part of a file is of: of the layers of each window."""
    return [values["plan_id"], *(part["plan_id"] for part in values["windows"].values())]


def write(path: Path, values: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write one file in place of the old one, whole or not at all."""
    text = json.dumps(values)
    write_file(path, PLAN, text, tensors, sha256=digest(text, tensors))


def load_plan(path: str | os.PathLike) -> Plan:
    """Read a plan; raises OSError where it cannot be read, and ValueError for a file that does not hold a whole, usable plan."""
    path = Path(path)
    name = f"path={str(path)!r}"
    metadata, tensors = read(path)
    expected, found = metadata.get("sha256"), digest(metadata["plan"], tensors)
    if found != expected:
        raise ValueError(f"{name}: the checksum is {found}, must be {expected!r}: damaged, or changed by hand")
    ranks = ALONE
    try:
        values = json.loads(metadata["plan"])
        if "ranks" in values:
            ranks, values, tensors = part_here(values, tensors, name)
        if metadata[PLAN.version_key] in WITHOUT_WINDOWS:
            values |= {"window": None, "windows": {}, "plan_id": None}
        if metadata[PLAN.version_key] in WITHOUT_PRESET and values["tiers"] is not None:
            values["tiers"] = tier_values(earlier_tiers(**values["tiers"], streams=values["layers"][0]))
        plan = plan_of(values, tensors, Source(str(path), ranks))
    except RanksError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{name}: not laid out as plan format {metadata[PLAN.version_key]} says: {error!r}") from error
    check_plan(plan, name)
    return plan


class RanksError(ValueError):
    """A plan file that holds nothing for this rank."""


def part_here(
    values: dict[str, Any], tensors: Mapping[str, Tensor], name: str
) -> tuple[Ranks, dict[str, Any], dict[str, Tensor]]:
    """This rank, and its part of a file that holds those of all; raises ValueError where it has none."""
    count, held = values["count"], sorted(map(int, values["ranks"]))
    if not isinstance(count, int) or count < 2:
        raise ValueError(f"count is {count!r}, must be an integer >= 2")
    rank = rank_here(count)
    if rank is None:
        raise RanksError(
            f"{name}: made on {count} ranks of tensor parallelism; load it where as many share a model, after from_pretrained"
        )
    if rank not in held:
        raise RanksError(f"{name}: holds the ranks {held} of {count}, not {rank}; save the plan on every rank")
    return Ranks(rank, count), values["ranks"][str(rank)], below(f"rank{rank}.", tensors)


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, named without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a plan file; raises ValueError for any other file."""
    metadata, tensors = read_file(path, PLAN)
    # Clones: the file is mapped, and writing into it would change the bases of a running model.
    return metadata, {name: tensor.clone() for name, tensor in tensors.items()}


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all that a plan file says."""
    found = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def tensors_of(plan: Plan) -> dict[str, Tensor]:
    """Every tensor of a plan by name, copied: safetensors refuses tensors that share memory."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in named(plan)}


def named(plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of every basis, of the rotation and of the coarse rule; of the layers with other windows too."""
    if plan.rotation is not None:
        yield FREQUENCIES, plan.rotation.frequencies
        if plan.rotation.coordinates is not None:
            yield COORDINATES, plan.rotation.coordinates
    for layer, weights in plan.coarse.weights.items() if plan.coarse is not None else ():
        yield f"{COARSE}{layer}", weights
    for layer, bases in plan.bases.items():
        for stream, basis in zip(plan.layers[layer].named, bases, strict=True):
            for name, tensor in basis._asdict().items():
                yield f"layers.{layer}.{stream}.{name}", tensor
    for window, part in plan.windows.items():
        for name, tensor in named(part):
            yield f"window{window}.{name}", tensor


def values_of(plan: Plan) -> dict[str, Any]:
    """All of a plan but its tensors, as JSON has it."""
    layers = [
        {"layer": layer}
        | {name: {**vars(stream), "bands": list(stream.bands.counts)} for name, stream in streams.named.items()}
        for layer, streams in sorted(plan.layers.items())
    ]
    return {
        **{name: getattr(plan, name) for name in SCALARS},
        "layers": layers,
        "tiers": tier_values(plan.tiers),
        "turn": None
        if plan.rotation is None
        else {"block": plan.rotation.block, "interleaved": plan.rotation.interleaved},
        "coarse": None if plan.coarse is None else {"modality": plan.coarse.modality, "share": plan.coarse.share},
        "window": plan.window,
        "windows": {str(window): values_of(part) for window, part in plan.windows.items()},
        "signature": list(plan.signature),
        "calibrated_on": plan.provenance.calibrated_on,
        "versions": dict(plan.provenance.versions) or versions(),
        "plan_id": plan.provenance.plan_id,
    }


class Source(NamedTuple):
    """What a file's plans have in common: its path, and the ranks that they are for."""

    path: str
    ranks: Ranks


def plan_of(values: dict[str, Any], tensors: Mapping[str, Tensor], source: Source) -> Plan:
    """The plan of a file's values and tensors; raises KeyError, TypeError or ValueError where they are laid out otherwise."""
    layers = {
        entry["layer"]: LayerPlan(**{name: stream_of(stream) for name, stream in entry.items() if name != "layer"})
        for entry in values["layers"]
    }
    bases = {
        layer: without_repeats(
            StreamBasis(*(tensors[f"layers.{layer}.{stream}.{name}"] for name in StreamBasis._fields))
            for stream in streams.named
        )
        for layer, streams in layers.items()
        if uses_bases(streams)
    }
    provenance = Provenance(values["calibrated_on"], values["versions"], source.path, values["plan_id"])
    for name in ("calibrated_on", "plan_id"):
        if not isinstance(values[name], str | None):
            raise TypeError(f"{name} is {values[name]!r}, must be a string or null")
    if set(map(type, (*provenance.versions, *provenance.versions.values()))) != {str}:
        raise TypeError(f"versions is {provenance.versions!r}, must be an object of strings")
    scalars = {name: values[name] for name in SCALARS}
    rotation = None
    if values["turn"] is not None:
        rotation = KeyRotation(tensors[FREQUENCIES], **values["turn"], coordinates=tensors.get(COORDINATES))
    weights = {int(name.removeprefix(COARSE)): t for name, t in tensors.items() if name.startswith(COARSE)}
    coarse = None if values["coarse"] is None else CoarseRule(**values["coarse"], weights=weights)
    windows = {
        int(window): plan_of(part, below(f"window{window}.", tensors), source)
        for window, part in values["windows"].items()
    }
    plan = Plan(
        layers,
        bases=bases,
        tiers=tiers_of(values["tiers"]),
        rotation=rotation,
        coarse=coarse,
        signature=tuple(values["signature"]),
        provenance=provenance,
        ranks=source.ranks,
        window=values["window"],
        windows=windows,
        **scalars,
    )
    if values_of(plan) != values or set(tensors) != set(dict(named(plan))):
        raise ValueError("it holds more than a plan, or one layer twice")
    return plan


def without_repeats(bases: Iterable[StreamBasis]) -> tuple[StreamBasis, ...]:
    """A layer's bases, equal ones as one: a file has a copy for each segment."""
    distinct: list[StreamBasis] = []
    found = []
    for basis in bases:
        same = next((other for other in distinct if all(map(torch.equal, basis, other))), None)
        distinct += [basis] if same is None else []
        found.append(basis if same is None else same)
    return tuple(found)


def tier_values(tiers: TierRule | None) -> dict[str, Any] | None:
    """Tiers as JSON has them: the preset and its options."""
    return {"preset": tiers.name, **asdict(tiers)} if isinstance(tiers, Preset) else None


def tiers_of(values: dict[str, Any] | None) -> Preset | None:
    """Tiers from JSON."""
    if values is None:
        return None
    return PRESETS[values["preset"]](**{name: value for name, value in values.items() if name != "preset"})


def earlier_tiers(
    full: float,
    partial: float,
    attended: float,
    kept: float,
    refresh_every: int,
    ema: list[float],
    text: dict[str, Any] | None,
    streams: dict[str, Any],
) -> Preset:
    """The preset of the tiers that formats before 7 have."""
    if text is not None:
        chosen = {f"text_{name}": value for name, value in text.items()}
        return AVLOptions(core=attended, secondary=kept, core_every=refresh_every, **chosen)
    key = streams["text_key"]
    stored = {"bits": 16 if key["bands"][0] else 4, "basis": key["scope"]}
    return AttentionPackOptions(full, partial, ema[0], refresh_every, evict=round(1 - kept, 12), **stored)


def stream_of(values: dict[str, Any]) -> StreamPlan:
    """A stream's plan from JSON."""
    return StreamPlan(**{**values, "bands": Bands(tuple(values["bands"]))})  # type: ignore[arg-type]


def versions() -> dict[str, str]:
    """Versions that a plan is made with; what follows a plus sign names the build alone."""
    found = {"apack_compile": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {name: str(version).split("+")[0] for name, version in found.items()}
