"""Statistics of a model's keys and values, and how its keys rotate."""
