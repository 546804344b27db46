"""A directory of prefixes, found by what was read."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apack_compile.generate.prefix import Prefix, load, model_that_reads, read_prefix
from apack_compile.generate.session import Session, session_of
from apack_compile.models.weights import weights_digest

SUFFIX = ".prefix"


class PrefixStore:
    """Prefixes in files of a directory, at most `limit_bytes` of them: those that were used longest ago go first.

    Several processes may use one directory. Raises ValueError for a bad argument.
    """

    def __init__(self, directory: str | os.PathLike, limit_bytes: int) -> None:
        if not isinstance(limit_bytes, int) or isinstance(limit_bytes, bool) or limit_bytes < 1:
            raise ValueError(f"limit_bytes={limit_bytes!r} must be an integer >= 1")
        self.directory, self.limit_bytes = Path(directory), limit_bytes
        self.directory.mkdir(parents=True, exist_ok=True)

    def read(self, model: nn.Module, **inputs: Any) -> Prefix:
        """As `apack_compile.read`, from a file where the same model has read the same inputs; else the file is written.

        A prefix that is larger than the limit is not kept.
        """
        model = model_that_reads(model)
        session = session_of(model)
        if session is None:
            raise ValueError(
                f"model: this {type(model).__name__} is not optimized; call apack_compile.optimize(model) first"
            )
        path = self.directory / f"{key_of(model, session, inputs)}{SUFFIX}"
        try:
            prefix = load(model, session, path)
            # not a touch: another process may have removed it by now
            os.utime(path)
            return prefix
        except (FileNotFoundError, ValueError):
            # not there, or of a plan that the model no longer has
            prefix = read_prefix(model, session, inputs)
        if prefix.nbytes <= self.limit_bytes:
            with self._locked():
                prefix.save(path)
                self._remove_oldest(path)
        return prefix

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time changes which files there are."""
        # POSIX alone
        import fcntl

        with open(self.directory / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _remove_oldest(self, newest: Path) -> None:
        """Remove files until the others fit; a process that has one mapped keeps its contents."""
        found = {path: path.stat() for path in self.directory.glob(f"*{SUFFIX}")}
        held = sum(stat.st_size for stat in found.values())
        for path, stat in sorted(found.items(), key=lambda item: item[1].st_mtime_ns):
            if held > self.limit_bytes and path != newest:
                path.unlink()
                held -= stat.st_size


def key_of(model: nn.Module, session: Session, inputs: Mapping[str, Any]) -> str:
    """A name for what a model reads, as it is optimized."""
    found = hashlib.sha256(f"{session.source.signature} {session.source.asked} {weights_digest(model)}".encode())
    for name, x in sorted(inputs.items()):
        if not isinstance(x, Tensor):
            found.update(f"\n{name} {x!r}".encode())
            continue
        found.update(f"\n{name} {x.dtype} {list(x.shape)}\n".encode())
        found.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()
