"""The transformers Cache with packed layers."""
