"""Operations of the packed cache: `apack::append`, `apack::unpack`, `apack::attend`."""

if __name__ == "apack_compile.kernels":
    from apack_compile.kernels import ops as ops
else:
    # transformers looks for the PyPI package `kernels` on Python's path, and a checkout may be there: Ray's actors look in the folder
    # that their job was started in. An error here would be one of `import transformers`; so this is a package too old to be used.
    __version__ = "0"
    __path__ = []

    def __getattr__(name: str) -> object:
        raise AttributeError(
            f"this folder is apack_compile.kernels, imported here as {__name__!r}; "
            "run from another folder, or install and import apack_compile (the PyPI package 'kernels' is a different one)"
        )
