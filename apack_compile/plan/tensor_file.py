"""One safetensors file of a known kind: JSON and a version in its metadata, and tensors."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from apack_compile.files import check_file, check_place, naming
from apack_compile.version import __version__


@dataclass(frozen=True)
class FileKind:
    """What files of a kind hold, the format that is written, earlier ones that are read too, and what writes them."""

    holds: str
    version: str
    writer: str
    earlier: tuple[str, ...] = ()

    @property
    def version_key(self) -> str:
        """The name of the format's version in a file's metadata; its values are there as `holds`."""
        return f"apack_{self.holds}"


def write_file(path: Path, kind: FileKind, values: str, tensors: Mapping[str, Tensor], **more: str) -> None:
    """Write one file in place of an old one, whole or not at all. values: JSON; more: further metadata."""
    check_place(path)
    metadata = {kind.version_key: kind.version, kind.holds: values, **more}
    with (
        naming(f"path={str(path)!r}", "a file's name in a folder that can be written to"),
        TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder,
    ):
        temporary, common = Path(folder) / "file", Path(folder) / "common"
        save_file(dict(tensors), temporary, metadata)
        # safetensors makes files that only their owner can read
        common.touch()
        temporary.chmod(common.stat().st_mode)
        os.replace(temporary, path)


def read_file(path: Path, kind: FileKind) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata, and tensors that are mapped into memory; raises OSError, and ValueError for a file of another kind."""
    wanted = f"a file that {kind.writer} wrote"
    check_file(path, "path", wanted)
    name, formats = f"path={str(path)!r}", (*kind.earlier, kind.version)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if kind.version_key not in metadata or kind.holds not in metadata:
                raise ValueError(f"{name}: a safetensors file, but not one that {kind.writer} wrote")
            if metadata[kind.version_key] not in formats:
                raise ValueError(
                    f"{name}: {kind.holds} format {metadata[kind.version_key]!r}; apack-compile {__version__} reads the "
                    f"format{'s' if len(formats) > 1 else ''} {', '.join(formats)}"
                )
            return metadata, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{name}: not a whole safetensors file: {error}; pass {wanted}") from error
