"""Files and folders that a caller names: what is wrong with one is said with the argument, its value and what it may be."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_file(path: Path, argument: str, wanted: str) -> None:
    """Raise an OSError of its kind for a path that cannot be read, ValueError for one that is no file. wanted: what to pass."""
    refuse_folder(path, argument, wanted)
    name = f"{argument}={str(path)!r}"
    if path.exists() and not path.is_file():
        raise ValueError(f"{name} is no file; pass {wanted}")
    with naming(name, wanted):
        path.open("rb").close()


def refuse_folder(path: Path, argument: str = "path", wanted: str = "a file's name") -> None:
    """Raise ValueError for a path that is a folder."""
    if path.is_dir():
        raise ValueError(f"{argument}={str(path)!r} is a folder; pass {wanted}")


def check_place(path: Path, argument: str = "path") -> None:
    """Raise ValueError for a path that is a folder, FileNotFoundError or NotADirectoryError where its folder is none."""
    refuse_folder(path, argument)
    folder = path.absolute().parent
    if not folder.is_dir():
        kind, why = (NotADirectoryError, "is a file") if folder.exists() else (FileNotFoundError, "does not exist")
        raise kind(
            f"{argument}={str(path)!r}: the folder {str(folder)!r} {why}; pass a file's name in a folder that exists"
        )


@contextmanager
def naming(name: str, wanted: str) -> Iterator[None]:
    """An OSError in this block keeps its kind, and says which argument it is about. name: the argument and its value."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name} does not exist; pass {wanted}") from error
    except OSError as error:
        raise type(error)(f"{name} cannot be used ({error.strerror or error}); pass {wanted}") from error
