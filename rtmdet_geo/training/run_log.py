"""What a run writes while it goes on: ``log.csv``, ``history.csv``, and the same for TensorBoard.

A run that was broken off and resumed leaves the same rows as one that was not, times apart: rows later than the
checkpoint go, and so does a last line that was not written to its end.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rtmdet_geo.errors import OutputError
from rtmdet_geo.outputs import staged_output

logger = logging.getLogger(__name__)

LOG, HISTORY, VALIDATION = "log.csv", "history.csv", "validation.csv"
#: Folder of TensorBoard's files in a run folder.
TENSORBOARD = "tensorboard"
#: Columns of log.csv before and after the terms of the loss. ``seconds``: of the iteration; ``data_wait``: share of the
#: time since the row before that was spent waiting for samples; ``images_per_second``: likewise since then.
COLUMNS_BEFORE = ("iteration", "lr", "loss")
COLUMNS_AFTER = ("grad_norm", "seconds", "data_wait", "images_per_second")


class RunLog:
    """The log of one run folder; each row is in the file when the call returns.

    Args:
        run: folder of the run; it exists.
        resume_at: iterations that the run has behind it; 0 begins anew.
        tensorboard: write TensorBoard's files too. Where it is not installed, one line of the log says so.

    Raises:
        OutputError: an earlier log cannot be changed.
    """

    def __init__(self, run: Path, *, resume_at: int = 0, tensorboard: bool = True) -> None:
        self.run = Path(run)
        for name in (LOG, HISTORY):
            _trim(self.run / name, resume_at)
        if resume_at == 0:
            for path in (self.run / TENSORBOARD).glob("events.out.tfevents.*"):
                path.unlink(missing_ok=True)
        self._board = _open_board(self.run / TENSORBOARD, resume_at) if tensorboard else None

    def step(self, iteration: int, values: Mapping[str, float]) -> None:
        """Append a row to log.csv.

        Args:
            iteration: how many are done.
            values: by column, in any order, ``iteration`` among them or not; terms of the loss ("loss_cls") keep
                theirs. Columns without a value stay empty, and further values become further columns. A file that is
                there keeps the columns it has.

        Raises:
            OutputError: the file cannot be written.
        """
        self._append(LOG, "train", iteration, values, log_columns(values))

    def validation(self, iteration: int, figures: Mapping[str, float]) -> None:
        """Append a row to history.csv: the figures of a validation, see :attr:`Validation.figures`.

        Raises:
            OutputError: the file cannot be written.
        """
        self._append(HISTORY, "validation", iteration, figures, ["iteration", *figures])

    def _append(
        self, name: str, group: str, iteration: int, values: Mapping[str, float], columns: Sequence[str]
    ) -> None:
        path = self.run / name
        try:
            is_new = not path.exists() or path.stat().st_size == 0
            if not is_new:
                with path.open(newline="", encoding="utf-8") as stream:
                    columns = next(csv.reader(stream))
            row = {key: f"{value:.9g}" for key, value in values.items()} | {"iteration": str(iteration)}
            with path.open("a", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, columns, restval="", extrasaction="ignore", lineterminator="\n")
                if is_new:
                    writer.writeheader()
                writer.writerow(row)
        except OSError as error:
            raise OutputError(f"cannot write {str(path)!r}: {error.strerror or error}; is the disk full?") from error
        if self._board is not None:
            for key in (key for key in values if key != "iteration"):
                self._board.add_scalar(f"{group}/{key}", values[key], iteration)
            self._board.flush()

    def close(self) -> None:
        """End TensorBoard's file; the others are complete."""
        if self._board is not None:
            self._board.close()


def log_columns(values: Iterable[str]) -> list[str]:
    """Return the columns of log.csv for such values: the terms of the loss between the fixed columns, others last."""
    fixed = {*COLUMNS_BEFORE, *COLUMNS_AFTER}
    terms = [name for name in values if name.startswith("loss_")]
    others = [name for name in values if name not in fixed and name not in terms]
    return [*COLUMNS_BEFORE, *terms, *COLUMNS_AFTER, *others]


def write_validation(run: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows of the last validation (see :attr:`Validation.rows`) to validation.csv; none, no file.

    Raises:
        OutputError: the file cannot be written.
    """
    if not rows:
        return
    with (
        staged_output(Path(run) / VALIDATION) as staged,
        staged.open("w", newline="", encoding="utf-8") as stream,
    ):
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of one of a run's tables by column; a last line that was broken off is left out.

    Returns:
        [] where the file is missing or has no row.
    """
    return [dict(zip(header, row, strict=True)) for header, row in _complete_rows(path)]


def _complete_rows(path: Path) -> list[tuple[list[str], list[str]]]:
    """Return each whole row with the header."""
    if not path.is_file():
        return []
    text, _, _ = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    header, *rows = list(csv.reader(text.splitlines())) or [[]]
    return [(header, row) for row in rows if len(row) == len(header)]


def _trim(path: Path, iteration: int) -> None:
    """Drop rows later than an iteration and what is no row; drop the file where nothing is left."""
    kept = [
        (header, row)
        for header, row in _complete_rows(path)
        if header[:1] == ["iteration"] and row[0].isdecimal() and int(row[0]) <= iteration
    ]
    if not kept:
        path.unlink(missing_ok=True)
        return
    with staged_output(path) as staged, staged.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows([kept[0][0], *(row for _, row in kept)])


def _open_board(folder: Path, resume_at: int) -> Any:
    """Return TensorBoard's writer, which takes back what was written after the checkpoint; None without the package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning(
            "tensorboard is not installed, so this run is logged to %s and %s only; pip install 'rtmdet-geo[train]' "
            "brings it, loop.tensorboard=false does without",
            LOG,
            HISTORY,
        )
        return None
    return SummaryWriter(str(folder), purge_step=resume_at + 1 if resume_at else None)
