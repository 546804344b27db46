"""Builds the compiled operations for CPUs, where there is a compiler, and tags the wheel by what was built.

The library is called through ctypes, so one wheel serves every Python. Everything else about the package is in pyproject.toml.
"""

import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

NATIVE = "apack_compile.kernels._native"
FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
# manylinux_2_28, as PyTorch's own wheels: its libraries, and the newest versions of their symbols.
MANYLINUX = "manylinux_2_28"
SYSTEM_LIBRARIES = re.compile(r"(ld-linux.*|libc|libm|libdl|libpthread|librt|libgcc_s|libstdc\+\+)\.so\.\d+")
NEWEST_SYMBOLS = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
WITHOUT = (
    "apack-compile: the compiled operations for CPUs were not built. The package works without them and gives the same results, but "
    "packing and attention on a CPU are slower. To have them, install a C++ compiler (g++ or clang++) and install apack-compile again. "
    "The reason: %s"
)


class BuildNative(build_ext):
    """A library for ctypes: no Python in its name or its symbols. Without a compiler the package is one of Python alone."""

    @property
    def library(self) -> Path:
        return Path(self.build_lib, self.get_ext_filename(NATIVE))

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except (CCompilerError, BaseError) as error:
            logging.warning(WITHOUT, error)
            self.library.unlink(missing_ok=True)

    def run(self) -> None:
        super().run()
        if self.extensions and not self.library.is_file():
            if self.inplace:
                Path("kernels", self.library.name).unlink(missing_ok=True)
            self.extensions = self.distribution.ext_modules = []


class BuildWheel(bdist_wheel):
    """Tagged py3-none and the platform of the compiled operations; py3-none-any without them."""

    def run(self) -> None:
        if not self.skip_build:
            self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        library = self.get_finalized_command("build_ext").library
        if not library.is_file():
            return "py3", "none", "any"
        if platform.startswith("linux_") and not self.plat_name_supplied:
            newer = list(beyond_manylinux(library))
            if newer:
                logging.warning("apack-compile: tagged %s, not %s: needs %s", platform, MANYLINUX, ", ".join(newer))
            else:
                platform = platform.replace("linux", MANYLINUX, 1)
        return "py3", "none", platform


def beyond_manylinux(library: Path) -> Iterator[str]:
    """What a shared library needs that not every system of the manylinux platform has."""
    objdump = shutil.which("objdump") or shutil.which("llvm-objdump")
    if objdump is None:
        yield "objdump, to see what it needs"
        return
    command, environment = [objdump, "-p", library], {**os.environ, "LC_ALL": "C"}
    headers = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    for name in re.findall(r"NEEDED\s+(\S+)", headers):
        if not SYSTEM_LIBRARIES.fullmatch(name):
            yield name
    for symbols, version in sorted(set(re.findall(r"\b([A-Z]+)_([\d.]+)$", headers, re.MULTILINE))):
        if tuple(map(int, version.split("."))) > NEWEST_SYMBOLS.get(symbols, ()):
            yield f"{symbols}_{version}"


if __name__ == "__main__":
    sources = sorted(map(str, Path("kernels/csrc").glob("*.cpp")))
    headers = sorted(map(str, Path("kernels/csrc").glob("*.h")))
    setup(
        ext_modules=[
            Extension(NATIVE, sources, depends=headers, language="c++", extra_compile_args=FLAGS, optional=True)
        ],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": BuildWheel},
    )
