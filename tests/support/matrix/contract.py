"""What every model type must keep: lossless tokens equal dense ones, every layer accounted for, ratio 4 held.

A type that `optimize` refuses is not applicable, with the refusal as its reason. Whatever else goes wrong is a failure, or, where
the dense model fails as well, broken upstream.
"""

import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

import apack_compile
from apack_compile.cache.accounting import DENSE_ELEMENT_BYTES, storage_bytes, unpacked_tensors
from apack_compile.generate.reporting import ONE_BY_ONE
from apack_compile.models.modality import vision_of

from .building import build, case_of, class_names
from .outcome import BROKEN_UPSTREAM, DENSE_LAYERS, FAILS, NOT_APPLICABLE, TESTED_ELSEWHERE, WORKS, Outcome
from .prompts import ANY_TOKEN, image_token, pixels_for, prompt_for

# What a layer is called in the report where it is not packed.
UNPACKED = ("dense", "no keys")
NEW_TOKENS = 12
SHORT, LONG = 40, 600
# Of a window's ring, one block more is stored than the window has.
LONG_WINDOW = 512
RATIO = 4
# Free slots and the first tokens weigh a little at 600 tokens.
HELD_SHARE = 0.9
# Of the largest score; the order of float32 sums differs.
SCORE_TOLERANCE = 1e-4


class BrokenContractError(Exception):
    """A model type does not keep the contract."""


def run(model_type: str, compiled: bool = True) -> Outcome:
    """Run the contract for one type; `compiled`: decode compiled as well."""
    warnings.simplefilter("ignore")
    name, case = class_names()[model_type], case_of(model_type)

    def outcome(status: str, reason: str = "", **found: str) -> Outcome:
        return Outcome(model_type, name, status, reason, **found)

    if case.elsewhere is not None:
        return outcome(TESTED_ELSEWHERE, case.elsewhere)
    try:
        model = build(model_type)
    except Exception as error:
        return outcome(BROKEN_UPSTREAM, f"cannot be built: {words(error)}")
    try:
        apack_compile.optimize(model, preset="lossless", compile="none")
    except ValueError as error:
        return outcome(NOT_APPLICABLE, str(error))
    apack_compile.restore(model)
    pixels = None if case.text_only else case.pixels or pixels_for(model)
    try:
        inputs = prompt_for(model, pixels, case.placeholders, SHORT)
        dense = generate(model, inputs, case.generate)
    except Exception as error:
        return outcome(BROKEN_UPSTREAM, words(error))
    try:
        found = {"prompt": describe_prompt(inputs, pixels, case.text_only)}
        check_modality(model, inputs)
        report = check_lossless(model, inputs, dense, case.generate)
        found["layers"] = describe_layers(report)
        if compiled:
            found["decode"] = check_compiled(model, inputs, dense, case.generate)
        if any(group.window is not None for group in apack_compile.new_cache(model).groups):
            model = build(model_type, LONG_WINDOW)
        long = prompt_for(model, pixels, case.placeholders, LONG)
        found["held"], found["keys"] = check_ratio(model, long, case.generate)
    except Exception as error:
        reason = words(error)
        static = (
            None if isinstance(error, BrokenContractError) else fails_with_static_cache(model, inputs, case.generate)
        )
        if static is not None:
            return outcome(BROKEN_UPSTREAM, f"transformers' own static cache fails as well: {static}", **found)
        return outcome(FAILS, reason, **found)
    unpacked = [line for line in report.layers if line.status in UNPACKED]
    dense = any(line.status == "dense" for line in unpacked)
    return outcome(DENSE_LAYERS if dense else WORKS, "; ".join(sorted({line.reason for line in unpacked})), **found)


def generate(model: nn.Module, inputs: dict[str, Tensor], settings: Any, **more: Any) -> Any:
    """Greedy generation of NEW_TOKENS tokens, with scores."""
    torch.manual_seed(0)
    return model.generate(
        **inputs,
        **settings,
        **more,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )


def check_modality(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Every token of the picture is known as one, where a token says so."""
    if image_token(model.config) == ANY_TOKEN:
        return
    picture = inputs["input_ids"].shape[1] - SHORT
    known = vision_of(model.config, inputs)
    if picture and (known is None or int(known.sum()) != picture):
        raise BrokenContractError(f"of {picture} picture tokens {0 if known is None else int(known.sum())} are known")


def check_lossless(model: nn.Module, inputs: dict[str, Tensor], dense: Any, settings: Any) -> Any:
    """Lossless tokens and scores equal the dense ones, and every layer is packed or says why not; the report."""
    apack_compile.optimize(model, preset="lossless", compile="none", strict=True)
    compare(generate(model, inputs, settings), dense, "eager decode")
    report = apack_compile.report(model)
    if report.bytes is None:
        raise BrokenContractError("generate used no packed cache")
    for line in report.layers:
        if line.status != "packed" and not (line.status in UNPACKED and line.reason):
            raise BrokenContractError(f"layer {line.layer} is {line.status}, reason {line.reason!r}")
    return report


def check_compiled(model: nn.Module, inputs: dict[str, Tensor], dense: Any, settings: Any) -> str:
    """Compiled decode gives the same tokens, every packed layer is rewritten; or decode is eager and the report says so."""
    apack_compile.optimize(model, preset="lossless", compile="eager", strict=True)
    compare(generate(model, inputs, settings), dense, "compiled decode")
    report = apack_compile.report(model)
    left = [line for line in report.layers if line.status in ("packed", "skipped")]
    if not left:
        return "compiled"
    if all(line.reason == ONE_BY_ONE for line in left) and len(report.graphs) >= len(left):
        return "compiled, layer by layer"
    eager = [note for note in report.notes if "decode runs eagerly" in note]
    if not eager or report.graphs:
        raise BrokenContractError(f"layer {left[0].layer} is {left[0].status}: {left[0].reason}")
    return "eager"


def check_ratio(model: nn.Module, inputs: dict[str, Tensor], settings: Any) -> tuple[str, str]:
    """Ratio 4 generates and the packed layers hold it; what they hold, and how keys are stored."""
    apack_compile.optimize(model, ratio=RATIO, compile="none", strict=True)
    cache = apack_compile.new_cache(model, NEW_TOKENS)
    out = generate(model, inputs, settings, past_key_values=cache)
    if not all(bool(torch.isfinite(scores).any()) for scores in out.scores):
        raise BrokenContractError("ratio=4: scores are not finite")
    held = held_by_packed_layers(cache)
    if held < HELD_SHARE * RATIO:
        raise BrokenContractError(f"ratio=4 holds {held:.2f}")
    return f"{held:.2f}", apack_compile.report(model).keys


def held_by_packed_layers(cache: Any) -> float:
    """Bytes of a dense 16-bit cache over the bytes held, of the packed layers alone."""
    report = cache.report()
    own = list(unpacked_tensors(cache))
    dense = report["dense_bytes"] - DENSE_ELEMENT_BYTES * sum(t.numel() for t in own)
    return dense / (report["sequence_bytes"] - storage_bytes(own))


def compare(packed: Any, dense: Any, where: str) -> None:
    """Raise BrokenContractError unless tokens and scores are the same."""
    if not torch.equal(packed.sequences, dense.sequences):
        raise BrokenContractError(f"{where}: tokens differ from the dense cache's")
    for step, (got, wanted) in enumerate(zip(packed.scores, dense.scores, strict=True)):
        finite = wanted.isfinite()
        error = float((got - wanted)[finite].abs().max() / wanted[finite].abs().max())
        if not error < SCORE_TOLERANCE:
            raise BrokenContractError(f"{where}: scores of step {step} differ by {error:.1e}")


def fails_with_static_cache(model: nn.Module, inputs: dict[str, Tensor], settings: Any) -> str | None:
    """How the model fails with transformers' own cache that can be compiled; None where it does not."""
    apack_compile.restore(model)
    try:
        generate(model, inputs, settings, cache_implementation="static", disable_compile=True)
    except Exception as error:
        return words(error)
    return None


def describe_prompt(inputs: dict[str, Tensor], pixels: Any, text_only: str | None) -> str:
    """The prompt in words."""
    if pixels is None:
        return f"text: {text_only or 'it sees no pictures'}"
    picture = inputs["input_ids"].shape[1] - SHORT
    return f"picture of {picture} tokens" if picture else "picture beside the text"


def describe_layers(report: Any) -> str:
    """How many layers are packed, dense and without keys."""
    counts = Counter(line.status for line in report.layers)
    said = {"packed": "packed", "dense": "dense", "no keys": "without keys"}
    return ", ".join(f"{counts[status]} {words}" for status, words in said.items() if counts[status])


def words(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, BrokenContractError) else f"{type(error).__name__}: {text}"[:300]
