"""Attentions in a graph, and their rewriting."""
