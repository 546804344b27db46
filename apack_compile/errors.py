"""Errors of the package."""


class StrictError(RuntimeError):
    """A graph still unpacks a packed cache, with strict=True or where the cache has tiers; or strict own_cache leaves one dense."""
