"""What `calibrate` is given: checked before the model sees it."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apack_compile.calibration.sensitivity import columns_of, states_of
from apack_compile.models.modality import padding_of, placeholder_ids, vision_of
from apack_compile.models.offload import hooks_of

ALLOWED = (
    "a dictionary of the model's inputs as torch tensors, such as processor(..., return_tensors='pt') gives, or several"
)
# What an input of text alone may have.
TEXT = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "logits_to_keep", "use_cache"}
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def checked_inputs(model: nn.Module, inputs: Any) -> list[Mapping[str, Any]]:
    """Calibration inputs as a list of dictionaries; raises ValueError, which names `inputs`, for anything that the model cannot read."""
    if isinstance(inputs, Mapping):
        batches = [inputs]
    elif isinstance(inputs, Iterable) and not isinstance(inputs, (str, bytes, Tensor)) and not is_numpy(inputs):
        batches = list(inputs)
    else:
        raise ValueError(f"inputs: {described(inputs)} must be {ALLOWED}")
    if not batches:
        raise ValueError(f"inputs: an empty {type(inputs).__name__}; pass {ALLOWED}")
    for number, batch in enumerate(batches):
        where = "" if batch is inputs else f"number {number}, "
        if not isinstance(batch, Mapping):
            raise ValueError(f"inputs: {where}{described(batch)}, must be a dictionary; pass {ALLOWED}")
        for problem in problems(model, batch):
            raise ValueError(f"inputs: {where}{problem}")
    return batches


def limited(model: nn.Module, batches: Sequence[Mapping[str, Any]], tokens: int | None) -> list[Mapping[str, Any]]:
    """The first inputs, with `tokens` tokens in all, padding included; None for no limit. Raises ValueError for another limit.

    The last one is cut behind them, unless it has more than text.
    """
    if tokens is None:
        return list(batches)
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ValueError(f"tokens={tokens!r} must be a whole number of at least 1, or None for no limit")
    kept: list[Mapping[str, Any]] = []
    for batch in batches:
        rows, length = states_of(batch).shape[:2]
        kept.append(batch if rows * length <= tokens else beginning(model, batch, -(-tokens // rows)))
        tokens -= rows * length
        if tokens <= 0:
            break
    return kept


def beginning(model: nn.Module, batch: Mapping[str, Any], tokens: int) -> Mapping[str, Any]:
    """The first `tokens` tokens of each row, from the first column with a real one on; all of an input with more than text."""
    vision, length = vision_of(model.config, batch), states_of(batch).shape[1]
    if (vision is not None and bool(vision.any())) or batch.keys() - TEXT:
        return batch
    padding = padding_of(batch, length)
    start = 0 if padding is None else int((~padding).any(0).to(torch.uint8).argmax())
    # masks of four dimensions are made for all columns
    plain = {name: x for name, x in batch.items() if name != "attention_mask"}
    real = {} if padding is None else {"attention_mask": (~padding).long()}
    return columns_of({**plain, **real}, slice(start, start + tokens))


def problems(model: nn.Module, batch: Mapping[str, Any]) -> Iterable[str]:
    """What is wrong with a dictionary of model inputs; each may rely on those before it."""
    for name, value in batch.items():
        if is_numpy(value):
            yield f"{name} is {described(value)}, must be a torch.Tensor; a processor gives those with return_tensors='pt'"
    given = [name for name in ("input_ids", "inputs_embeds") if batch.get(name) is not None]
    if not given:
        yield f"a dictionary with {sorted(map(str, batch)) or 'nothing in it'}, must have input_ids [B, T] or inputs_embeds [B, T, hidden]"
    for name in given:
        states, dimensions = batch[name], "[B, T]" if name == "input_ids" else "[B, T, hidden]"
        if not isinstance(states, Tensor):
            yield f"{name} is {described(states)}, must be a torch.Tensor {dimensions}; a processor gives one with return_tensors='pt'"
        if states.dim() != dimensions.count(",") + 1:
            yield f"{name} has the shape {list(states.shape)}, must be {dimensions}"
        if 0 in states.shape:
            yield f"{name} has the shape {list(states.shape)}, must hold at least one token"
    yield from device_problems(model, batch)
    if batch.get("input_ids") is not None:
        yield from id_problems(model, batch["input_ids"])
    mask, shape = batch.get("attention_mask"), list(batch[given[0]].shape[:2])
    if mask is not None and not isinstance(mask, (Tensor, Mapping)):
        yield f"attention_mask is {described(mask)}, must be a torch.Tensor {shape}"
    if isinstance(mask, Tensor) and (mask.dim() not in (2, 4) or (mask.dim() == 2 and list(mask.shape) != shape)):
        yield f"attention_mask has the shape {list(mask.shape)}, must be {shape}, as {given[0]}"
    parameters = inspect.signature(model.forward).parameters
    unknown = [name for name in batch if name not in parameters]
    if unknown and not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        yield f"{', '.join(map(str, unknown))}: {type(model).__name__}.forward has no such argument"


def device_problems(model: nn.Module, batch: Mapping[str, Any]) -> Iterable[str]:
    """Tensors that are not where the model is; accelerate's hooks move them to where its parts are."""
    moved = next(hooks_of(model), None) is not None
    for name, value in batch.items():
        if isinstance(value, Tensor) and (value.is_meta or (value.device != model.device and not moved)):
            yield f"{name} is on the device {value.device}, must be on the model's, {model.device}"


def id_problems(model: nn.Module, ids: Tensor) -> Iterable[str]:
    """Token ids that the model has no embedding for; placeholders of pictures need none."""
    if ids.dtype not in INTEGERS:
        yield f"input_ids has the dtype {ids.dtype}, must be an integer type"
    rows = vocabulary(model)
    others = ids[~torch.isin(ids, torch.tensor(placeholder_ids(model.config), dtype=ids.dtype, device=ids.device))]
    if rows is not None and others.numel() and not 0 <= int(others.min()) <= int(others.max()) < rows:
        yield f"input_ids has ids from {int(others.min())} to {int(others.max())}, must be from 0 to {rows - 1}"


def vocabulary(model: nn.Module) -> int | None:
    """How many token ids the model has embeddings for; None where it does not say."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        return None
    rows = getattr(embedding, "num_embeddings", None)
    named = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    known = [count for count in (rows, named) if isinstance(count, int)]
    return max(known) if known else None


def is_numpy(value: Any) -> bool:
    """Whether something is a numpy array; numpy need not be there."""
    return type(value).__module__ == "numpy"


def described(value: Any) -> str:
    """What something is, in a few words."""
    name = type(value).__name__
    article = "an" if name[0].lower() in "aeiou" or name == "ndarray" else "a"
    return f"{article} {name}" + (f" {list(value.shape)}" if hasattr(value, "shape") else "")
