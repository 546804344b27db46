"""Packed KV caches in exported programs and plain graph modules (docs/guides/export.md)."""
