"""What is refused of transformers' continuous batching: its requests live in a cache of its own."""

from typing import Any, NoReturn

# What a model offers; `transformers serve` calls the first.
ENTRANCES = ("init_continuous_batching", "continuous_batching_context_manager", "generate_batch")
PAGED_CACHE = "PagedAttentionCache"


def refuse_continuous_batching(what: str, *_: Any, **__: Any) -> NoReturn:
    """Raise ValueError for a way into continuous batching, named `what`."""
    raise ValueError(
        f"{what}: continuous batching is refused for now: it keeps all requests in a paged dense cache of its own (transformers' "
        f"{PAGED_CACHE}), which cannot be packed yet; call generate with a batch of prompts, or apack_compile.restore(model) first"
    )


def refuse_paged_cache(cache: Any) -> None:
    """Raise ValueError where a forward pass is given the cache of continuous batching: by a manager that nothing else could refuse."""
    if type(cache).__name__ == PAGED_CACHE:
        refuse_continuous_batching(PAGED_CACHE)
