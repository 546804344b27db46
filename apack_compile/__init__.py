"""Makes vision-language models decode with a small KV cache."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from apack_compile.supported_versions import SUPPORTED, check_versions, missing
from apack_compile.version import __version__ as __version__

if TYPE_CHECKING:
    from apack_compile.api import calibrate, new_cache, optimize, plan_for, report, restore
    from apack_compile.backend.graph_log import GraphLog
    from apack_compile.backend.graph_report import GraphReport
    from apack_compile.cache.cache import CompactedCache
    from apack_compile.config import AttentionPackConfig
    from apack_compile.generate.reporting import Report
    from apack_compile.plan.plan import Plan
    from apack_compile.plan.presets import AttentionPackOptions, AVLOptions

check_versions()

_HOME = {
    "AVLOptions": "plan.presets",
    "AttentionPackConfig": "config",
    "AttentionPackOptions": "plan.presets",
    "CompactedCache": "cache.cache",
    "GraphLog": "backend.graph_log",
    "GraphReport": "backend.graph_report",
    "Plan": "plan.plan",
    "Report": "generate.reporting",
    "calibrate": "api",
    "new_cache": "api",
    "optimize": "api",
    "plan_for": "api",
    "report": "api",
    "restore": "api",
}
__all__ = [
    "AVLOptions",
    "AttentionPackConfig",
    "AttentionPackOptions",
    "CompactedCache",
    "GraphLog",
    "GraphReport",
    "Plan",
    "Report",
    "calibrate",
    "new_cache",
    "optimize",
    "plan_for",
    "report",
    "restore",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        try:
            module = import_module(f"apack_compile.{_HOME[name]}")
        except ModuleNotFoundError as error:
            if error.name in SUPPORTED:
                raise ImportError(missing(error.name), name=error.name) from error
            raise
        return getattr(module, name)
    raise AttributeError(f"module 'apack_compile' has no attribute {name!r}")
