"""Which versions of torch and transformers this package works with, checked when it is imported."""

import importlib
import importlib.metadata
import re
import sys

# From the first, up to and without the second; pyproject.toml says the same.
SUPPORTED = {"torch": ((2, 11), (2, 16)), "transformers": ((5, 17), (5, 25))}


def check_versions() -> None:
    """Raise ImportError where torch is missing, or a version of torch or transformers is not supported.

    Operations alone run without transformers, so that one may be missing.
    """
    for name in SUPPORTED:
        version = installed_version(name)
        if version is None and name == "torch":
            raise ImportError(missing(name), name=name)
        if version is not None and not is_supported(name, version):
            text = (
                f"apack_compile works with {requirement(name)}; installed is {version}: pip install {requirement(name)}"
            )
            raise ImportError(text, name=name)


def installed_version(name: str) -> str | None:
    """The version of a package, imported or not; None where it is not installed."""
    module = sys.modules.get(name)
    if module is not None and isinstance(getattr(module, "__version__", None), str):
        return str(module.__version__)
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
    try:
        # from a folder on the path
        return str(importlib.import_module(name).__version__)
    except ModuleNotFoundError:
        return None


def is_supported(name: str, version: str) -> bool:
    """Whether a version is in the range; a pre-release counts as the release it leads to, a local part does not count.

    A version that is not written as numbers is taken for supported.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    least, end = SUPPORTED[name]
    return numbers is None or least <= (int(numbers[1]), int(numbers[2])) < end


def requirement(name: str) -> str:
    """The range, quoted as a shell needs it."""
    least, end = (".".join(map(str, version)) for version in SUPPORTED[name])
    return f'"{name}>={least},<{end}"'


def missing(name: str) -> str:
    """What to say where a package is not installed."""
    return f"apack_compile needs {name}, which is not installed: pip install {requirement(name)}"
