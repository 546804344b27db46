"""Tokens to codes."""
