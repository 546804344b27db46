"""One random graph, rewritten and compared with itself."""

import re
from dataclasses import dataclass

import torch
from capture import cloned
from random_graphs import Program, random_program
from torch import Tensor

from apack_compile.passes import FuseAttend, RemoveDeadCode, ShareHeads, run_passes
from apack_compile.passes.attention.origin import is_unpack
from apack_compile.passes.graph.effects import op_name

DTYPES = (torch.float64, torch.float64, torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Verdict:
    """What became of a graph: `wrong` says what is not as it must be."""

    wrong: str | None
    attentions: int
    rewritten: int
    reasons: tuple[str, ...]


def judge(seed: int) -> Verdict:
    """Build the graph of a seed, rewrite it, and compare."""
    dtype = DTYPES[seed % len(DTYPES)]
    program = random_program(seed, dtype)
    old = _run(program, seed)
    before = program.gm.code
    try:
        record = run_passes(program.gm, (FuseAttend(), ShareHeads(), RemoveDeadCode()))
        new = _run(program, seed)
    except RuntimeError as error:
        return Verdict(f"rewriting or the rewritten graph fails: {error}"[:300], program.attentions, 0, ())
    count = record.passes[0].count
    reasons = tuple(general(site.reason) for site in record.sites if site.reason is not None)

    def verdict(wrong: str | None) -> Verdict:
        return Verdict(wrong, program.attentions, count, reasons)

    nodes = list(program.gm.graph.nodes)
    if sum(op_name(n) in ("apack::attend", "apack::attend_tiers") for n in nodes) != count:
        return verdict("the count is not the number of attends")
    if any(is_unpack(n) for n in nodes) and not record.left:
        return verdict("a cache is unpacked and no reason is given")
    if len(record.sites) < program.attentions:
        return verdict("an attention is neither rewritten nor refused")
    if count == 0 and not record.shared_heads:
        return verdict(None if program.gm.code == before else "a graph was changed although nothing was rewritten")
    return verdict(_difference(old, new, None if dtype == torch.float64 else _exact(seed, dtype)))


def general(reason: str) -> str:
    """A reason without the names and numbers of one graph."""
    reason = re.sub(r"\((?:[^()]|\(\d+,?\))*\)", "(...)", reason)
    reason = re.sub(r"write \w+", "write something", reason)
    reason = re.sub(r" of \w+ between", " between", reason)
    return re.sub(r"\b\d+\b", "N", reason)


def _run(program: Program, seed: int) -> list[Tensor]:
    """Outputs, then inputs as they are afterwards."""
    inputs = cloned(program.inputs)
    torch.manual_seed(seed)
    with torch.no_grad():
        out = program.gm(*inputs)
    return [*out, *inputs]


def _exact(seed: int, dtype: torch.dtype) -> list[Tensor]:
    return _run(random_program(seed, dtype, exact=True), seed)


def _difference(old: list[Tensor], new: list[Tensor], exact: list[Tensor] | None) -> str | None:
    """Where the new results are not the old ones: in float64 up to rounding, else no further from float64 than the old."""
    for at, (before, after) in enumerate(zip(old, new, strict=True)):
        if before.shape != after.shape or before.dtype != after.dtype:
            return f"result {at} is {after.dtype} {tuple(after.shape)}, was {before.dtype} {tuple(before.shape)}"
        if before.numel() == 0:
            continue
        a, b = before.double(), after.double()
        reference = a if exact is None else exact[at].double()
        # Scores that a graph returns overflow in float32 where two masks add up, not in float64.
        finite = a.isfinite() & reference.isfinite()
        if not torch.equal(a.isnan(), b.isnan()) or not torch.equal(a.isfinite(), b.isfinite()):
            return f"result {at} is nan or infinite elsewhere than before"
        a, b, reference = (torch.where(finite, x, 0.0) for x in (a, b, reference))
        eps = torch.finfo(before.dtype).eps if before.is_floating_point() else 0.0
        size = 1.0 + float(reference.abs().max())
        allowed = 1e-10 * size if exact is None else 3 * float((a - reference).abs().max()) + eps * size
        if float((b - reference).abs().max()) > allowed:
            return f"result {at} differs by {float((b - reference).abs().max()):.3g}, allowed is {allowed:.3g}"
    return None
