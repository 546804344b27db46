"""What `optimize` keeps on a model."""

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from pickle import PicklingError
from typing import Any

from torch import nn
from transformers.cache_utils import DynamicCache

from apack_compile.cache.cache import CompactedCache
from apack_compile.cache.layer_kinds import LayerKind
from apack_compile.calibration.calibrate import calibrate, groups_for, key_block_for
from apack_compile.checks import counted
from apack_compile.config import AttentionPackConfig
from apack_compile.errors import StrictError
from apack_compile.generate.decode_step import DecodeSteps
from apack_compile.models.offload import check_one_device, computing_device
from apack_compile.plan.plan import Plan
from apack_compile.plan.signature import describe, signature_of
from apack_compile.plan.source import Calibration, PlanSource
from apack_compile.plan.time_model import default_min_tokens

ATTRIBUTE = "_apack_session"
DEFAULT_NEW_TOKENS = 64


@dataclass
class LastUse:
    """What the report says of the last packed cache and of passes without one.

    cache: weakly. held: its bytes and notes. unused: why the last generate used none. dense_passes: forward passes of the model without
    one, since the last with it.
    """

    cache: weakref.ref[CompactedCache] | None = None
    held: tuple[dict[str, Any], list[str]] | None = None
    unused: str | None = None
    dense_passes: int = 0

    def remember(self, cache: CompactedCache) -> None:
        """Keep what a cache holds; the cache itself may go."""
        plan = cache.index.plan
        coarse = None if plan.coarse is None else {"modality": plan.coarse.modality, "share": plan.coarse.share}
        held = {**cache.report(), "tail_slots": plan.tail_slots, "coarse": coarse}
        self.held = (held, list(cache.notes))

    def held_now(self) -> tuple[dict[str, Any], list[str]] | None:
        """Bytes and notes of the last cache: as it is now, or as its last generate left it."""
        cache = self.cache() if self.cache is not None else None
        if cache is not None and cache.is_filled:
            self.remember(cache)
        return self.held


class Threads(threading.local):
    """What each thread does now: `cache`, that of the eager pass that runs, weakly; `is_own`: a pass of generate or calibration."""

    cache: weakref.ref[CompactedCache] | None = None
    is_own = False


@dataclass
class Session:
    """Configuration, layers, plans and compiled steps of one optimized model."""

    config: AttentionPackConfig
    kinds: list[LayerKind]
    source: PlanSource
    # The model's adapters when it was optimized.
    first_adapters: tuple
    # What compiles decode steps, and why.
    inner: str | None
    inner_reason: str
    decode: DecodeSteps | None = None
    hooks: tuple[Any, ...] = ()
    rotary_hooks: tuple[Any, ...] = ()
    # A user's functions in whose place optimize put its own.
    replaced: dict[str, Any] = field(default_factory=dict)
    # Why the calibration may not be this model's any more.
    outdated: str | None = None
    last: LastUse = field(default_factory=LastUse)
    # Threads may share a model.
    lock: Any = field(default_factory=threading.RLock)
    running: Threads = field(default_factory=Threads)

    def __deepcopy__(self, memo: dict) -> "Session":
        """For a copied model; what belongs to threads is its own."""
        copied = {
            f.name: deepcopy(getattr(self, f.name), memo) for f in fields(self) if f.name not in ("lock", "running")
        }
        return Session(**copied)

    def __reduce__(self) -> Any:
        # No TypeError: Ray puts pages of its own before the message of one.
        raise PicklingError(
            "an optimized model cannot be pickled: call apack_compile.restore(model) first, or use save_pretrained; calibrated bases "
            "are saved by apack_compile.plan_for(model, tokens).save(path). To other processes, such as Ray's actors, pass the path of "
            "the model's folder and that of the plan (apack_compile.ray.BatchJob does so), or a function that loads and optimizes it"
        )

    @property
    def plan(self) -> Plan | None:
        """The plan that was given for all prompts."""
        return self.source.given

    @property
    def calibration(self) -> Calibration | None:
        """The last calibration of the model."""
        return self.source.calibration

    @property
    def graphs(self) -> list[Any]:
        """Records of the graphs compiled so far."""
        return [] if self.decode is None else self.decode.graphs

    @property
    def ratio(self) -> float | None:
        """The ratio that plans are made for; None with a preset or a given plan."""
        return self.source.ratio

    @property
    def adapters(self) -> tuple:
        """The model's adapters when its bases were calibrated, or a plan was given."""
        given = self.plan is not None or self.calibration is None
        return self.first_adapters if given else self.calibration.adapters

    def min_tokens(self, device: str) -> int:
        """Tokens of a row from which generate packs, on a type of device."""
        if self.config.min_tokens is not None:
            return self.config.min_tokens
        return 0 if self.ratio is None else default_min_tokens(device)

    def too_short(self, prompt: int | None, new_tokens: int, device: str) -> str | None:
        """Why a generate call keeps transformers' own cache; None where it packs, as it does where the prompt's length is unknown."""
        least = self.min_tokens(device)
        if prompt is None or prompt + new_tokens >= least:
            return None
        return f"prompt of {prompt} and {counted(new_tokens, 'new token')}; packed from min_tokens={least} on"

    def follow(self, model: nn.Module) -> None:
        """Take over the model's dtype and device as they are now; raises ValueError where a given plan was made for another dtype."""
        signature, device = signature_of(model), computing_device(model)
        if self.plan is not None and signature != self.source.signature:
            raise ValueError(
                f"plan: made for {describe(self.plan.signature)}; the model now has {describe(signature)}; "
                "optimize it with a plan made for that"
            )
        with self.lock:
            if (signature, device) != (self.source.signature, self.source.device):
                self.source = self.source.of_model(signature, device)

    def new_cache(self, model: nn.Module, expected_tokens: int) -> CompactedCache:
        """An empty cache for one batch of sequences; raises ValueError where the model cannot generate."""
        if computing_device(model).type == "meta":
            raise ValueError("model: its weights are on the meta device now; load them before it generates")
        check_one_device(model)
        self.follow(model)
        own, source = DynamicCache(config=model.config.get_text_config(decoder=True)), self.source
        strict = self.config.strict
        cache = CompactedCache(self.kinds, own, source, expected_tokens, source.signature, strict, model.dtype)
        self.last.cache = weakref.ref(cache)
        return cache

    def calibrate(self, model: nn.Module, inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]], source: str) -> None:
        """Fit what all requests share to inputs; plans and later caches use it."""
        batches = [inputs] if isinstance(inputs, Mapping) else inputs
        with self.lock, self.own_passes():
            self.take(calibrate(model, self.source.layers, batches, self.config, source))

    def take(self, calibration: Calibration) -> None:
        """Plans and later caches use this calibration."""
        self.source, self.outdated = self.source.calibrated(calibration), None

    def calibrate_on_first(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Calibrate on a first request, where nothing else did; raises ValueError for one that is too short."""
        with self.lock:
            if not self.source.needs_calibration:
                return
            try:
                self.calibrate(model, inputs, "the first request")
            except ValueError as error:
                raise first_request_error(self.ratio, error) from error

    def take_calibration(self, other: "Session", model: nn.Module) -> None:
        """Take over what another session of the model calibrated, where this one's plans can use it; else say why not."""
        found = other.calibration
        if found is None:
            return
        with_plan = self.plan is not None or other.plan is not None
        if with_plan and (other.outdated is not None or other.adapters != self.adapters):
            return
        groups, config = found.groups, self.config
        if self.ratio is not None:
            config = replace(config, key_block=key_block_for(model, self.source.layers, config))
            # beside the weights that were calibrated, which may be quantized by now
            groups = groups_for(model, config, groups.layers, found.weight_bytes)
        usable = {
            f"key_block={found.key_block}": config.key_block in (None, found.key_block),
            f"head_groups={found.groups.count}": groups.count == found.groups.count,
            f"coarse={found.ranked}": set(self.config.coarse) <= set(found.ranked),
        }
        if all(usable.values()):
            self.source, self.outdated = self.source.calibrated(found), other.outdated
        elif self.ratio is not None:
            was = ", ".join(name for name, fits in usable.items() if not fits)
            self.outdated = (
                f"the earlier calibration cannot be used (it was made with {was}): "
                "call calibrate, or the next request is calibrated on"
            )

    def newest(self, source: PlanSource) -> PlanSource:
        """The source of a cache without a prompt, with what was calibrated since the cache was made."""
        is_own = source.ratio is not None and (source.ratio, source.asked) == (self.ratio, self.source.asked)
        return self.source if is_own else source

    def tell(self, cache: CompactedCache, text: str) -> None:
        """Note on a cache what was not done as asked; raises StrictError when strict."""
        if self.config.strict:
            raise StrictError(f"strict: {text}")
        cache.note(text)

    def count_dense(self) -> None:
        """A forward pass of the model was given no packed cache; those of generate and calibration say so elsewhere."""
        if not self.running.is_own:
            self.last.dense_passes += 1

    @contextmanager
    def own_passes(self) -> Iterator[None]:
        """Forward passes of this thread are those of generate or of calibration."""
        before, self.running.is_own = self.running.is_own, True
        try:
            yield
        finally:
            self.running.is_own = before


def first_request_error(ratio: float | None, why: object) -> ValueError:
    """What is said of a first request that is too short to be calibrated on."""
    return ValueError(
        f"ratio={ratio:g}: the first request cannot serve as calibration ({why}); "
        "call apack_compile.calibrate(model, inputs) on longer ones first"
    )


def session_of(model: nn.Module) -> Session | None:
    """The session of an optimized model, or None."""
    return vars(model).get(ATTRIBUTE)
