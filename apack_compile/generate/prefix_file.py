"""A prefix as one safetensors file (docs/format.md, "Prefix files"), and on another device."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apack_compile.cache.cache import CompactedCache
from apack_compile.cache.prefix_checks import tensor_named
from apack_compile.cache.prefix_contents import check_bases, contents_of, fill
from apack_compile.cache.prefix_values import field_of, groups_of
from apack_compile.generate.session import Session
from apack_compile.models.coordinates import rope_deltas_of
from apack_compile.models.modality import vision_of
from apack_compile.models.weights import weights_digest
from apack_compile.plan.file import versions
from apack_compile.plan.ranks import ALONE, ranks_of
from apack_compile.plan.signature import describe, signature_of
from apack_compile.plan.tensor_file import FileKind, read_file, write_file

PREFIX = FileKind("prefix", "1", "Prefix.save")
INPUT_IDS, DELTAS = "input_ids", "rope_deltas."


def contents(model: nn.Module, input_ids: Tensor, cache: CompactedCache) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All that a prefix is, as values that JSON has and as tensors; raises ValueError where layers hold what no file has."""
    groups, tensors = contents_of(cache)
    tensors |= {INPUT_IDS: input_ids, **{DELTAS + name: x for name, x in cache.groups.rope_deltas.items()}}
    of_model = {"signature": list(cache.signature), "weights": weights_digest(model), "versions": versions()}
    ranks = ranks_of(model)
    of_model |= {"ranks": str(ranks)} if ranks.count > 1 else {}
    return of_model | {"groups": groups}, tensors


def cache_of_contents(
    model: nn.Module, session: Session, values: Any, tensors: Mapping[str, Tensor], about: str
) -> CompactedCache:
    """The cache of a prefix; raises ValueError where this model would not read it right."""
    try:
        made_for, weights = tuple(field_of(values, "signature", list)), field_of(values, "weights", str)
        groups = groups_of(values)
        ids = checked_ids(tensor_named(INPUT_IDS, tensors)).cpu()
        deltas = {name.removeprefix(DELTAS): x for name, x in tensors.items() if name.startswith(DELTAS)}
        own, ranks = signature_of(model), str(ranks_of(model))
        read_on = values.get("ranks", str(ALONE))
        if read_on != ranks:
            raise ValueError(
                f"read on {read_on!r:.80} of tensor parallelism; this is {ranks}: each rank saves and loads a file of its own, with its "
                "rank in the name"
            )
        if made_for != own:
            raise ValueError(f"read by a model with {described(made_for)}; this one has {describe(own)}")
        if weights != weights_digest(model):
            raise ValueError("read by a model with other weights, adapters or rotary settings than this one's")
        check_deltas(model, deltas)
        cache = session.new_cache(model, 0)
        with hinted():
            choose_plans(model, cache, ids)
            check_bases(cache, groups)
        fill(cache, groups, tensors, ids.shape[1], model.dtype)
    except ValueError as error:
        raise ValueError(f"{about}: {error}") from error
    cache.groups.rope_deltas = deltas
    return cache


def checked_ids(ids: Tensor) -> Tensor:
    """Token ids of one prompt; raises ValueError for any other tensor."""
    if ids.dim() != 2 or len(ids) != 1 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{INPUT_IDS} is {ids.dtype} {list(ids.shape)}, and must be integers [1, P]")
    return ids


def described(signature: tuple) -> str:
    """A signature in words, whatever it is."""
    try:
        return describe(signature)
    except (TypeError, ValueError):
        return repr(signature)


def check_deltas(model: nn.Module, deltas: Mapping[str, Tensor]) -> None:
    """Raise ValueError where a model does not remember these `rope_deltas`."""
    known = rope_deltas_of(model)
    if deltas.keys() != known.keys():
        raise ValueError(f"rope_deltas of {sorted(deltas)}, and this model has those of {sorted(known)}")
    for name, x in deltas.items():
        if x.numel() != 1:
            raise ValueError(f"{DELTAS}{name} is {list(x.shape)}, and must be one number")


@contextmanager
def hinted() -> Iterator[None]:
    """What fails in this block says where the plan of a prefix comes from."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{error}; optimize this model with the plan of the one that read it, which plan_for(model, tokens).save(path) keeps"
        ) from error


def choose_plans(model: nn.Module, cache: CompactedCache, ids: Tensor) -> None:
    """Choose the plans of an empty cache for a prompt."""
    vision, none = vision_of(model.config, {"input_ids": ids}), torch.zeros(ids.shape, dtype=torch.bool)
    cache.groups.choose_plans((none if vision is None else vision).numpy(), none.numpy())


def write(path: str | os.PathLike, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write one file in place of an old one, whole or not at all."""
    write_file(Path(path), PREFIX, json.dumps(values), {name: alone(x) for name, x in tensors.items()})


def alone(x: Tensor) -> Tensor:
    """A tensor that shares its memory with no other one, which safetensors refuses."""
    x = x.detach().cpu().contiguous()
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


def read(path: str | os.PathLike) -> tuple[Any, dict[str, Tensor]]:
    """What `write` was given, tensors mapped into memory; raises FileNotFoundError, and ValueError for any other file."""
    metadata, tensors = read_file(Path(path), PREFIX)
    try:
        return json.loads(metadata[PREFIX.holds]), tensors
    except ValueError as error:
        raise ValueError(
            f"path={str(path)!r}: not laid out as prefix format {PREFIX.version} says: {error!r}"
        ) from error
