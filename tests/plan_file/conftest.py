"""Plans that tests share."""

from pathlib import Path
from typing import Any

import pytest

import apack_compile


@pytest.fixture(scope="module")
def calibrated() -> Any:
    from saved_plans import RATIO, llama, prompt

    model = apack_compile.optimize(llama(), ratio=RATIO, compile="none", min_tokens=0)
    return apack_compile.calibrate(model, [prompt(1), prompt(2)])


@pytest.fixture(scope="module")
def plan(calibrated) -> "apack_compile.Plan":
    return apack_compile.plan_for(calibrated, 240, 0.375)


@pytest.fixture(scope="module")
def coarse_plan() -> "apack_compile.Plan":
    from saved_plans import llama, prompt

    model = apack_compile.optimize(llama(), ratio=6, compile="none", min_tokens=0)
    apack_compile.calibrate(model, [prompt(1), prompt(2), prompt(3)])
    plan = apack_compile.plan_for(model, 1_000, 0.375)
    assert plan.coarse is not None
    return plan


@pytest.fixture
def saved(plan, tmp_path) -> Path:
    path = tmp_path / "plan.safetensors"
    plan.save(path)
    return path
