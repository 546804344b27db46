"""What a batch job does: checked where it is written down, carried out on the actors."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from apack_compile.config import AttentionPackConfig
from apack_compile.plan.plan import Plan

# Options of generate that would give something else than one answer a row, or that a job has a field for.
NOT_FOR_JOBS = {
    "max_new_tokens",
    "max_length",
    "num_return_sequences",
    "return_dict_in_generate",
    "streamer",
    "cache",
    "past_key_values",
}
SETTINGS = {"config", "quantize", "compile", "strict", "min_tokens"}
WHAT_TO_PASS = (
    "pass the path of its folder, or a function without arguments that loads it on the actor and returns it with its tokenizer "
    "or processor"
)


@dataclass(frozen=True)
class BatchJob:
    """One prompt a row, one answer a row: what `Answers` loads, reads and writes.

    Raises TypeError for a model object, ValueError for any other wrong value. Nothing is loaded before an actor has the job.

    - model: path of a model's folder, the same on every machine, or a function without arguments that returns the model and its
      tokenizer or processor.
    - plan: path of a saved plan, or a Plan. ratio, preset: instead of a plan, as for `optimize`.
    - settings: other arguments of `optimize`, such as {"compile": "none"}. A model that its function optimized is taken as it is
      where nothing is given.
    - prompt, pictures, answer: names of columns. A row's pictures are an array `[H, W, 3]`, the bytes of a file, or a list of these.
    - error: column for what is wrong with a row, "" where nothing is; None: a batch with such a row raises.
    - key: column that names rows in errors; None: their place in the batch.
    - chat: prompts are what a user says; the model's chat template is put around them.
    - max_new_tokens, generate: of each answer, and other options of `generate`. Without any, decoding is greedy.
    - max_tokens: of the rows that are generated together, prompts padded to the longest and new tokens. A longer row runs alone.
    - budget_bytes: of the packed cache of these rows (`largest_batch`).
    """

    model: str | os.PathLike | Callable[[], tuple[Any, Any]]
    plan: Plan | str | os.PathLike | None = None
    ratio: float | None = None
    preset: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    prompt: str = "prompt"
    pictures: str | None = None
    answer: str = "answer"
    error: str | None = None
    key: str | None = None
    chat: bool = False
    max_new_tokens: int = 64
    generate: Mapping[str, Any] = field(default_factory=lambda: {"do_sample": False})
    max_tokens: int = 16_384
    budget_bytes: int | None = None

    def __post_init__(self) -> None:
        self._check_model()
        for name in ("model", "plan"):
            path = getattr(self, name)
            if isinstance(path, (str, os.PathLike)):
                # an actor's working directory is another one
                object.__setattr__(self, name, os.path.abspath(path))
        if self.plan is not None and not isinstance(self.plan, (Plan, str, os.PathLike)):
            raise ValueError(f"plan={self.plan!r} must be a Plan, or the path of a saved one")
        self._check_settings()
        for name in ("prompt", "pictures", "answer", "error", "key"):
            column = getattr(self, name)
            if not isinstance(column, str) and (column is not None or name in ("prompt", "answer")):
                raise ValueError(f"{name}={column!r} must be the name of a column")
        for name in ("max_new_tokens", "max_tokens", "budget_bytes"):
            number = getattr(self, name)
            if (not isinstance(number, int) or isinstance(number, bool) or number < 1) and (
                number is not None or name != "budget_bytes"
            ):
                raise ValueError(f"{name}={number!r} must be an integer >= 1")
        if self.budget_bytes is not None and self.plan is None and self.preset is None:
            raise ValueError("budget_bytes: what a cache takes is known from a plan; pass plan= too")
        refused = NOT_FOR_JOBS & set(self.generate)
        if refused:
            raise ValueError(
                f"generate: a job has one answer a row of max_new_tokens; leave {', '.join(sorted(refused))} out"
            )

    def _check_model(self) -> None:
        model = self.model
        if isinstance(model, nn.Module) or not (isinstance(model, (str, os.PathLike)) or callable(model)):
            raise TypeError(f"model: {WHAT_TO_PASS}, not a {type(model).__name__}")

    def _check_settings(self) -> None:
        """Raise ValueError for what `optimize` would refuse on every actor."""
        unknown = set(self.settings) - SETTINGS
        if unknown:
            raise ValueError(f"settings: {', '.join(sorted(unknown))}: has {', '.join(sorted(SETTINGS))} of optimize")
        values = {name: value for name, value in self.settings.items() if name in ("compile", "strict", "min_tokens")}
        config = AttentionPackConfig(ratio=self.ratio, preset=self.preset, **values)
        chosen = [f"{name}={getattr(self, name)!r}" for name in ("ratio", "preset") if getattr(self, name) is not None]
        if chosen and self.plan is not None:
            raise ValueError(f"plan and {', '.join(chosen)} exclude each other; pass one of them")
        given = self.settings.get("config", config)
        if not isinstance(given, AttentionPackConfig):
            raise ValueError(f"settings: config={given!r} must be an AttentionPackConfig")
        if "config" in self.settings and (chosen or self.plan is not None or len(self.settings) > 1):
            raise ValueError("settings: a config says all; leave plan, ratio, preset and the other settings out")

    def optimize_arguments(self) -> dict[str, Any]:
        """Arguments of `optimize` that the job gives; reads the plan where it is a path."""
        plan = self.plan if self.plan is None or isinstance(self.plan, Plan) else Plan.load(self.plan)
        given = {"plan": plan, "ratio": self.ratio, "preset": self.preset, **self.settings}
        return {name: value for name, value in given.items() if value is not None}
