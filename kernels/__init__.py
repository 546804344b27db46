"""Operations of the packed cache: `apack::append`, `apack::unpack`, `apack::attend`."""

if __name__ != "apack_compile.kernels":
    raise ImportError(
        f"this folder is apack_compile.kernels, imported here as {__name__!r}; "
        "run from another folder, or install and import apack_compile (the PyPI package 'kernels' is a different one)"
    )

from apack_compile.kernels import ops as ops
