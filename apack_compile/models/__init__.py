"""What is known of transformers' models: their cache argument, wrappers around them, where their tokens are."""
