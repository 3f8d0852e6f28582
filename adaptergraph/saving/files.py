"""Files that are written as one: drafts with names of their own that take their places at the end. Floor 5."""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..errors import GraphError, here

_DEAD = 3600.0


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes files into a folder; any number of processes and threads may do so at the same time.

    All of them are on the disk, under names of their own, before the first takes its place; they take their places in
    the order given. The drafts of a process that was killed are removed by whoever writes here an hour later.

    Args:
        folder: made if it is not there.
        files: contents by name.

    Raises:
        GraphError: it cannot be done; the path and the reason are named.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> write_files(folder, {"a": b"1", "b": b"2"})
    >>> sorted(path.name for path in folder.iterdir())
    ['a', 'b']
    """
    with _named_reason(folder):
        _refuse_what_is_in_the_way(folder, files)
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder, files)
        with ExitStack() as drafts:
            written = {name: drafts.enter_context(_draft(folder / name, data)) for name, data in files.items()}
            for name, draft in written.items():
                os.replace(draft, folder / name)
        _sync(folder)


def made_folder(folder: Path) -> Path:
    """A folder that is there, and made if it was not.

    Raises:
        GraphError: it cannot be made; the path and the reason are named.
    """
    with _named_reason(folder):
        _refuse_what_is_in_the_way(folder, ())
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _named_reason(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise GraphError(
            f"cannot write into {str(folder)!r}: {_reason(error)}",
            source=here(),
            hint="give a folder that can be made and written to, on a disk with space left",
        ) from None


def read_file(path: Path, hint: str) -> bytes:
    """What is in a file.

    Raises:
        GraphError: it cannot be read; the path and the reason are named.
    """
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise GraphError(f"cannot read {str(path)!r}: {_reason(error)}", source=here(), hint=hint) from None


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _refuse_what_is_in_the_way(folder: Path, files: Iterable[str]) -> None:
    if os.path.lexists(folder) and not folder.is_dir():
        kind = "a file" if folder.exists() else "a link to what is not there"
        raise GraphError(f"{str(folder)!r} is {kind}, not a folder", source=here(), hint="ag.save writes into a folder")
    for name in files:
        if (folder / name).is_dir():
            raise GraphError(
                f"{str(folder / name)!r} is a folder, not a file",
                source=here(),
                hint="ag.save writes a file of this name: move the folder away, or save into another one",
            )


@contextmanager
def _draft(path: Path, data: bytes) -> Iterator[Path]:
    """A file with this content, for `path`, under a name that nobody else uses; gone afterwards."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(draft, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def _sweep(folder: Path, names: Mapping[str, bytes]) -> None:
    """Removes drafts that nobody has written to for an hour."""
    ours = re.compile("|".join(rf"\.{re.escape(name)}\.[0-9a-f]{{32}}" for name in names))
    for path in folder.iterdir():
        if ours.fullmatch(path.name):
            with suppress(OSError):  # another writer swept it
                if time.time() - path.stat().st_mtime > _DEAD:
                    path.unlink()


def _sync(folder: Path) -> None:
    if os.name == "nt":  # where a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
