"""Outputs appear whole or not at all: written under a temporary name beside their place, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from rtmdet_geo.errors import OutputError, RTMDetGeoError


def check_folder(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Check that a file could be written to ``path``, whatever its format.

    Raises:
        OutputError: the folder is missing or not writable, ``path`` is a folder, or it exists and ``overwrite`` is
            False.
    """
    path = Path(path)
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"folder {str(folder)!r} of the output does not exist; make it first")
    if path.is_dir():
        raise OutputError(f"output {str(path)!r} is a folder; give a file name")
    if path.exists() and not overwrite:
        raise OutputError(f"output {str(path)!r} exists; add --overwrite to replace it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"folder {str(folder)!r} of the output is not writable; choose another")


def _umask() -> int:
    """Return the permissions that new files of this process lack."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _make_place(path: Path) -> Path:
    """Return a new folder beside ``path`` for what is to get that name.

    Raises:
        OutputError: the operating system refuses.
    """
    try:
        return Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise OutputError(f"cannot write into folder {str(path.parent)!r}: {error.strerror or error}") from error


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Make an OutputError, which names the output, of what the operating system refuses meanwhile."""
    try:
        yield
    except OSError as error:
        if isinstance(error, RTMDetGeoError):
            raise
        raise OutputError(f"cannot write {str(path)!r}: {error.strerror or error}; is the disk full?") from error


def _settle(staged: Path) -> None:
    """Have a file reach the disk, and let others read it; some writers make private files."""
    with staged.open("rb+") as stream:
        os.fsync(stream.fileno())
    staged.chmod(0o666 & ~_umask())


@contextmanager
def staged_output(path: str | os.PathLike[str], *, suffix: str | None = None) -> Iterator[Path]:
    """Give a temporary path to write; rename it to ``path`` when the block ends well, remove it when it does not.

    The temporary file lies in its own folder beside ``path``, so side files (SQLite's journals) go with it.

    Args:
        path: final name; replaced if it exists.
        suffix: extension of the temporary file; None: that of ``path``.

    Raises:
        OutputError: the operating system refuses (folder not writable, disk full).
    """
    path = Path(path)
    folder = _make_place(path)
    try:
        with _disk_errors(path):
            staged = folder / (path.name if suffix is None else path.stem + suffix)
            yield staged
            _settle(staged)
            for ending in ("-wal", "-shm", "-journal"):  # of an old file: SQLite would replay them into the new one
                path.with_name(path.name + ending).unlink(missing_ok=True)
            os.replace(staged, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def staged_set(paths: Sequence[str | os.PathLike[str]]) -> Iterator[Path]:
    """Give a temporary path for several files that are one output (a Shapefile's); they get their names together.

    No file system renames several files at once, so: the old ones are set aside, the first of them first, and the new
    first one comes last. Whoever looks for it finds the old set, none, or the new set, and never parts of both. Where
    that fails the old set is put back; a process that is killed in between leaves it in ``.NAME.*.partial``.

    Args:
        paths: final names in one folder, of one stem and one extension each; the first is the one that readers open.
            Those that are there are replaced, or removed if the new set has no such file.

    Yields:
        Where to write the first; the others go beside it, with the same stem and extensions in lower case.

    Raises:
        OutputError: the operating system refuses (folder not writable, disk full).
    """
    finals = [Path(path) for path in paths]
    first = finals[0]
    around = _make_place(first)
    new, old = around / "new", around / "old"
    try:
        with _disk_errors(first):
            new.mkdir()
            old.mkdir()
            yield new / (first.stem + first.suffix.lower())
            for part in new.iterdir():
                _settle(part)
            _swap([(new / (path.stem + path.suffix.lower()), path, old / path.name) for path in finals])
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        for folder in (old, around):
            with suppress(OSError):  # gone already, or it holds what could not be put back, which is not to be lost
                folder.rmdir()


def _swap(moves: Sequence[tuple[Path, Path, Path]]) -> None:
    """Set files aside and give their names to others: each move is (new file, final name, where the old one goes)."""
    placed = []
    try:
        for _, path, aside in moves:
            if path.exists():
                path.rename(aside)
        for new, path, _ in reversed(moves):
            if new.exists():
                new.rename(path)
                placed.append(path)
    except BaseException:
        for path in reversed(placed):
            path.unlink()
        for _, path, aside in reversed(moves):
            if aside.exists():
                aside.rename(path)
        raise


@contextmanager
def staged_folder(path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[Path]:
    """Give an empty temporary folder to fill; rename it to ``path`` when the block ends well, else remove it.

    Args:
        path: final name, in a folder that is made if it is missing; a folder of that name is deleted once the new one
            has its place, so the caller sees to it that nothing else than an earlier output is lost.
        overwrite: False refuses a folder that is there.

    Raises:
        OutputError: ``path`` exists and ``overwrite`` is False, or is no folder, or the operating system refuses
            (folder not writable, disk full).
    """
    path = Path(path)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise OutputError(f"output {str(path)!r} is no folder; give another name")
    if path.exists() and not overwrite:
        raise OutputError(f"output {str(path)!r} exists; add --overwrite to replace it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        around = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise OutputError(f"cannot write to {str(path.parent)!r}: {error.strerror or error}") from error
    try:
        with _disk_errors(path):
            staged = around / "new"
            staged.mkdir()
            yield staged
            move_folder(staged, path, around / "old")
    finally:
        shutil.rmtree(around, ignore_errors=True)


def move_folder(folder: Path, path: Path, aside: Path) -> None:
    """Give a folder its final name; one that has the name is set aside, and put back if that fails.

    Args:
        folder: to rename.
        path: its final name.
        aside: where an earlier folder goes, on the same disk; it is the caller's to delete.

    Raises:
        OSError: the operating system refuses.
    """
    if path.exists():
        path.rename(aside)
    try:
        folder.rename(path)
    except OSError:
        if aside.exists():
            aside.rename(path)
        raise


def check_replaceable(path: str | os.PathLike[str], what: str, is_own: Callable[[Path], bool]) -> None:
    """Refuse to replace anything but an earlier folder of the same kind.

    Args:
        path: of the output; where nothing is, anything may come.
        what: the folder holds.
        is_own: says whether an entry of the folder is such.

    Raises:
        OutputError: there is a file or a link, or a folder that holds something else.
    """
    path = Path(path)
    if not (path.exists() or path.is_symlink()):
        return
    if path.is_symlink() or not path.is_dir():
        raise OutputError(f"output {str(path)!r} is no folder of {what}; give another name")
    foreign = sorted(entry.name for entry in path.iterdir() if entry.is_dir() or not is_own(entry))
    if foreign:
        raise OutputError(
            f"folder {str(path)!r} holds other files than {what} ({', '.join(foreign[:3])}), which would be deleted; "
            "give another name"
        )


def check_not_input(
    path: str | os.PathLike[str], source: str | os.PathLike[str], what: Literal["scene", "source"] = "scene"
) -> None:
    """Refuse an output that is the very file that is read.

    Args:
        path: of the output.
        source: that is read.
        what: its name in the message.

    Raises:
        OutputError: they are the same file.
    """
    if os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
        raise OutputError(f"output {os.fspath(path)!r} is the {what} itself; give another name")


def check_not_among(path: str | os.PathLike[str], sources: Iterable[str | os.PathLike[str]]) -> None:
    """Refuse an output that is one of the files that are read, or a file in a folder of them that is no table (.csv).

    Raises:
        OutputError: it is.
    """
    if not os.path.exists(path):
        return
    place = Path(path).resolve()
    for source in sources:
        check_not_input(path, source, "source")
        if place.is_file() and place.suffix.lower() != ".csv" and Path(source).resolve() in place.parents:
            raise OutputError(
                f"output {os.fspath(path)!r} is a file of the source {os.fspath(source)!r}; give another name"
            )
