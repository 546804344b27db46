"""Which compiler a rewritten graph is handed to."""

import shutil

AUTO = "auto"
NO_COMPILER = "there is neither an accelerator nor a C++ compiler that Inductor would find"


def resolve_compile(mode: str, device_type: str) -> tuple[str | None, str]:
    """The inner compiler for a type of device (None: decode is not compiled), and why."""
    if mode != AUTO:
        return None if mode == "none" else mode, "as asked"
    if device_type != "cpu":
        return "inductor", f"auto: there is an accelerator ({device_type})"
    compiler = cpp_compiler()
    if compiler:
        return "inductor", f"auto: there is a C++ compiler ({compiler})"
    return "eager", f"auto: {NO_COMPILER}; the rewritten graph runs eagerly"


def cpp_compiler() -> str | None:
    """The C++ compiler that Inductor would call (CXX, else the platform's), or None where it is not there."""
    # imported here: the backend is found by name without it
    from torch._inductor import config

    names = config.cpp.cxx if isinstance(config.cpp.cxx, (list, tuple)) else (config.cpp.cxx,)
    return next((name for name in names if name is not None and shutil.which(name)), None)
