"""Evaluation of packed models with lm-eval (docs/guides/evaluation.md); importing it registers the model `apack`."""

try:
    from apack_compile.eval.packed_lm import PackedLM
except ImportError as error:
    if (error.name or "").split(".")[0] not in ("lm_eval", "accelerate"):
        raise
    raise ImportError(
        f"apack_compile.eval needs lm-eval ({error}): pip install 'apack-compile[eval]'", name=error.name
    ) from error

__all__ = ["PackedLM"]
