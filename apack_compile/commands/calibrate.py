"""`apack-compile calibrate` and `apack-compile plan show`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import apack_compile
from apack_compile.cache.accounting import shared_tensors, storage_bytes
from apack_compile.checks import counted, size
from apack_compile.commands.data import calibration_data, vision_share
from apack_compile.commands.subject import load_subject
from apack_compile.demo.progress import bar_of, new_console
from apack_compile.files import check_file, check_place
from apack_compile.plan.layer_bytes import layer_bytes
from apack_compile.plan.plan import Plan
from apack_compile.plan.signature import describe

BAR = 24


@dataclass(frozen=True)
class CalibrateOptions:
    """What `apack-compile calibrate` was asked for. vision_share: of the prompts to come; None: that of the data."""

    model: Path | None
    data: Path | None
    output: Path
    ratio: float
    tokens: int
    vision_share: float | None
    limit: int | None


def run_calibrate(options: CalibrateOptions) -> Plan:
    """Calibrate a model on data and save the plan; raises ValueError or OSError before any work where it cannot be saved."""
    check_place(options.output, "output")
    if options.tokens < 1:
        raise ValueError(f"tokens={options.tokens} must be at least 1")
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"limit={options.limit} must be at least 1")
    if options.vision_share is not None and not 0 <= options.vision_share <= 1:
        raise ValueError(f"vision_share={options.vision_share} must be between 0 and 1")
    console = new_console()
    with bar_of(console, "loading the model"):
        subject = load_subject(options.model)
        apack_compile.optimize(subject.model, ratio=options.ratio, compile="none")
    with bar_of(console, "reading the data"):
        inputs = calibration_data(subject, options.data, options.tokens)
    share = vision_share(subject, inputs) if options.vision_share is None else options.vision_share
    with bar_of(console, f"calibrating on {sum(given['input_ids'].numel() for given in inputs):,} tokens"):
        apack_compile.calibrate(subject.model, inputs, tokens=options.limit)
        plan = apack_compile.plan_for(subject.model, options.tokens, share)
    plan.save(options.output)
    for line in (f"wrote {options.output} ({size(options.output.stat().st_size)})", *plan_lines(plan)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"use it: optimize(model, plan=Plan.load({str(options.output)!r}))", highlight=False, markup=False)
    return plan


def show_plan(path: Path) -> list[str]:
    """What is in a plan file; raises OSError, and ValueError for a file without a plan."""
    check_file(path, "FILE", "a plan that was saved with `apack-compile calibrate`")
    return [f"{path} ({size(path.stat().st_size)})", *plan_lines(Plan.load(path))]


def plan_lines(plan: Plan) -> list[str]:
    """A plan in words, then a line for each layer."""
    parts = plan.by_window.values()
    shared = storage_bytes(tensor for part in parts for tensor in shared_tensors(part))
    made = ", ".join(f"{name} {version}" for name, version in plan.provenance.versions.items())
    keys = "as they are" if plan.rotation is None else f"rotated back to the start of their {plan.rotation.block} slots"
    return [
        f"for {describe(plan.signature)}",
        f"calibrated on: {plan.provenance.calibrated_on or 'nothing'}; made with {made}",
        f"dense: the first {plan.first_tokens} tokens and the newest {plan.tail_slots}; keys {keys}; "
        f"{counted(plan.groups, 'head group')}; {size(shared)} of bases shared by all requests",
        *_layer_lines(plan),
    ]


def _layer_lines(plan: Plan) -> Iterator[str]:
    layers = layer_bytes(plan)
    longest = max(layer.dense for layer in layers)
    yield f"{'layer':>5}  {'bytes of a text token':<{BAR}}  {'packed':>7}  {'dense':>6}  {'expected loss of variance':>25}"
    for layer in layers:
        packed, dense = (round(BAR * held / longest) for held in (layer.packed, layer.dense))
        bar = "█" * packed + "░" * (dense - packed)
        lost = "-" if layer.lost is None else f"{layer.lost:.1%}"
        yield f"{layer.layer:>5}  {bar:<{BAR}}  {layer.packed:>7,.0f}  {layer.dense:>6,}  {lost:>25}"
