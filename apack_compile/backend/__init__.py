"""The Dynamo backend and what it does with graphs that own their cache."""

from apack_compile.backend.backend import attentionpack
from apack_compile.errors import StrictError

__all__ = ["StrictError", "attentionpack"]
