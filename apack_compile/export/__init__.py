"""Packed KV caches in exported programs and plain graph modules (docs/export.md)."""
