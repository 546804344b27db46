"""Graph passes over Dynamo graphs: find attention sites, fuse them into `apack::attend`, share heads, list stock caches,
pack static buffers, hand linear layers to oneDNN, drop what became dead.
"""

if __name__ != "apack_compile.passes":
    raise ImportError(
        f"this folder is apack_compile.passes, imported here as {__name__!r}; "
        "run from another folder, or install and import apack_compile"
    )

from apack_compile.passes.attention.fuse_attend import FuseAttend
from apack_compile.passes.attention.share_heads import RepeatedHeads, ShareHeads
from apack_compile.passes.attention.sites import AttentionSite, find_sites
from apack_compile.passes.base import GraphRecord, MatchRecord, Pass, PassRecord, Refusal, run_passes
from apack_compile.passes.buffers.cache_updates import CacheUpdate, FindCacheUpdates, find_cache_updates
from apack_compile.passes.buffers.pack_buffers import PackBuffers
from apack_compile.passes.buffers.pairs import BufferPair
from apack_compile.passes.graph.dead_code import RemoveDeadCode
from apack_compile.passes.graph.linear_layers import LinearThroughOneDnn

__all__ = [
    "AttentionSite",
    "BufferPair",
    "CacheUpdate",
    "FindCacheUpdates",
    "FuseAttend",
    "GraphRecord",
    "LinearThroughOneDnn",
    "MatchRecord",
    "PackBuffers",
    "Pass",
    "PassRecord",
    "Refusal",
    "RemoveDeadCode",
    "RepeatedHeads",
    "ShareHeads",
    "find_cache_updates",
    "find_sites",
    "run_passes",
]
