"""A directory of prefixes, found by what was read."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apack_compile.files import naming
from apack_compile.generate.prefix import Prefix, check_prompt, load, model_that_reads, read_prefix
from apack_compile.generate.session import Session, session_of
from apack_compile.models.weights import weights_digest
from apack_compile.plan.ranks import all_agree

SUFFIX = ".prefix"
# What has one repr, and no other value the same.
PLAIN = (type(None), bool, int, float, str)


class PrefixStore:
    """Prefixes in files of a directory, at most `limit_bytes` of them: those that were used longest ago go first.

    Several processes may use one directory; ranks of tensor parallelism each keep their part, and read together. Raises ValueError for a
    bad argument.
    """

    def __init__(self, directory: str | os.PathLike, limit_bytes: int) -> None:
        if not isinstance(limit_bytes, int) or isinstance(limit_bytes, bool) or limit_bytes < 1:
            raise ValueError(f"limit_bytes={limit_bytes!r} must be an integer >= 1")
        self.directory, self.limit_bytes = Path(directory), limit_bytes
        with naming(f"directory={str(directory)!r}", "a folder, or the name of one to make"):
            self.directory.mkdir(parents=True, exist_ok=True)

    def read(self, model: nn.Module, **inputs: Any) -> Prefix:
        """As `apack_compile.read`, from a file where the same model has read the same inputs; else the file is written.

        A prefix whose file is larger than the limit is not kept. Raises ValueError for an input that is not made of tensors and plain
        values, which no file can be found by.
        """
        model = model_that_reads(model)
        session = session_of(model)
        if session is None:
            raise ValueError(
                f"model: this {type(model).__name__} is not optimized; call apack_compile.optimize(model) first"
            )
        check_prompt(inputs)
        session.follow(model)
        path = self.directory / f"{key_of(model, session, inputs)}{SUFFIX}"
        kept, why = self._kept(model, session, path)
        # what one rank has to read anew, all of them read
        if all_agree(model, kept is not None):
            return kept
        prefix = read_prefix(model, session, inputs)
        if why is not None:
            prefix._cache.note(f"store: the file that was kept could not be used, and the prompt was read anew: {why}")
        if prefix.nbytes <= self.limit_bytes:
            with self._locked():
                prefix.save(path)
                self._make_room(path)
        return prefix

    def _kept(self, model: nn.Module, session: Session, path: Path) -> tuple[Prefix | None, str | None]:
        """The prefix of a file; else why the file cannot be used, None where there is none."""
        try:
            prefix = load(model, session, path)
        except FileNotFoundError:
            return None, None
        except (OSError, ValueError) as error:
            # of another user, of a plan that the model no longer has, or damaged
            return None, str(error)
        # another process may have removed it by now
        with suppress(FileNotFoundError):
            os.utime(path)
        return prefix, None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time changes which files there are."""
        # POSIX alone
        import fcntl

        with open(self.directory / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, newest: Path) -> None:
        """Remove a new file that alone does not fit, else others until all do; a process that has one mapped keeps its contents."""
        found = {path: path.stat() for path in self.directory.glob(f"*{SUFFIX}")}
        if found[newest].st_size > self.limit_bytes:
            newest.unlink()
            return
        held = sum(stat.st_size for stat in found.values())
        for path, stat in sorted(found.items(), key=lambda item: item[1].st_mtime_ns):
            if held > self.limit_bytes and path != newest:
                path.unlink()
                held -= stat.st_size


def key_of(model: nn.Module, session: Session, inputs: Mapping[str, Any]) -> str:
    """A name for what a model reads, as it is optimized; raises ValueError for an input that cannot be told from others."""
    found = hashlib.sha256(f"{session.source.signature} {session.source.asked} {weights_digest(model)}".encode())
    if session.source.ranks.count > 1:
        found.update(f" {session.source.ranks}".encode())
    for name, x in sorted(inputs.items()):
        found.update(f"\n{name} ".encode())
        _add(found, name, x)
    return found.hexdigest()


def _add(found: Any, name: str, x: Any) -> None:
    """Put a value of an argument into a hash: its kind and length first, so that no two values look alike."""
    if isinstance(x, Tensor):
        found.update(f"{x.dtype} {list(x.shape)}\n".encode())
        found.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(x, list | tuple):
        found.update(f"{len(x)} items\n".encode())
        for item in x:
            _add(found, name, item)
    elif isinstance(x, Mapping):
        found.update(f"{len(x)} named items\n".encode())
        for key, item in x.items():
            _add(found, name, key)
            _add(found, name, item)
    elif type(x) in PLAIN:
        # what repr gives of a string has no line break
        found.update(f"{x!r}\n".encode())
    else:
        raise ValueError(
            f"{name}: a {type(x).__name__} cannot be told from others; pass tensors, and lists or dictionaries of tensors and numbers"
        )
