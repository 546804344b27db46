"""What the contract found out about one model type."""

from dataclasses import dataclass

WORKS = "works"
DENSE_LAYERS = "works with dense layers"
NOT_APPLICABLE = "not applicable"
BROKEN_UPSTREAM = "broken upstream"
TESTED_ELSEWHERE = "tested elsewhere"
FAILS = "fails"
STATUSES = (WORKS, DENSE_LAYERS, NOT_APPLICABLE, BROKEN_UPSTREAM, TESTED_ELSEWHERE, FAILS)


@dataclass(frozen=True)
class Outcome:
    """One row of docs/support.md.

    status: one of STATUSES. reason: of any other than `works`, and what the layers without keys are. prompt: what the model was
    asked. layers: how many are packed, dense and without keys. decode: compiled or eager, and why eager. held: bytes of a dense
    16-bit cache over those of the packed layers at `ratio=4`. keys: how packed keys are stored.
    """

    model_type: str
    model_class: str
    status: str
    reason: str = ""
    prompt: str = ""
    layers: str = ""
    decode: str = ""
    held: str = ""
    keys: str = ""
