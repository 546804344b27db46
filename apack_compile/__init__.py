"""Makes vision-language models decode with a small KV cache."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from apack_compile.supported_versions import SUPPORTED, check_versions, missing
from apack_compile.version import __version__ as __version__

if TYPE_CHECKING:
    from apack_compile.api import (
        calibrate,
        largest_batch,
        load_prefix,
        new_cache,
        optimize,
        plan_for,
        read,
        report,
        restore,
    )
    from apack_compile.backend.graph_log import GraphLog
    from apack_compile.backend.graph_report import GraphReport
    from apack_compile.cache.cache import CompactedCache
    from apack_compile.config import AttentionPackConfig
    from apack_compile.generate.prefix import Prefix
    from apack_compile.generate.prefix_store import PrefixStore
    from apack_compile.generate.ranks_report import RanksReport
    from apack_compile.generate.reporting import Report
    from apack_compile.plan.plan import Plan
    from apack_compile.plan.presets import *  # noqa: F403

check_versions()

_HOME = {
    "AttentionPackConfig": "config",
    "CompactedCache": "cache.cache",
    "GraphLog": "backend.graph_log",
    "GraphReport": "backend.graph_report",
    "Plan": "plan.plan",
    "Prefix": "generate.prefix",
    "PrefixStore": "generate.prefix_store",
    "RanksReport": "generate.ranks_report",
    "Report": "generate.reporting",
    "calibrate": "api",
    "largest_batch": "api",
    "load_prefix": "api",
    "new_cache": "api",
    "optimize": "api",
    "plan_for": "api",
    "read": "api",
    "report": "api",
    "restore": "api",
}
__all__ = [
    "AVLOptions",  # noqa: F405
    "AttentionPackConfig",
    "AttentionPackOptions",  # noqa: F405
    "CompactedCache",
    "GraphLog",
    "GraphReport",
    "Plan",
    "Prefix",
    "PrefixStore",
    "RanksReport",
    "Report",
    "calibrate",
    "largest_batch",
    "load_prefix",
    "new_cache",
    "optimize",
    "plan_for",
    "read",
    "report",
    "restore",
]


def __getattr__(name: str) -> Any:
    home = "plan.presets" if name.endswith("Options") else _HOME.get(name)
    if home is not None:
        try:
            module = import_module(f"apack_compile.{home}")
        except ModuleNotFoundError as error:
            package = str(error.name).partition(".")[0]
            if package in SUPPORTED:
                raise ImportError(missing(package), name=package) from error
            raise
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"module 'apack_compile' has no attribute {name!r}")
