"""The demo: a small real vision-language model answers questions about real pictures."""
