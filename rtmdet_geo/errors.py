"""Every exception and warning class of the package.

Each exception also inherits the built-in that a caller would catch, so ``except FileNotFoundError`` works as well as
``except RTMDetGeoError``. Messages are one line: what happened, where, what to do next.
"""

from __future__ import annotations


class RTMDetGeoError(Exception):
    """Base of all errors raised on purpose by rtmdet_geo."""


class ConfigError(RTMDetGeoError, ValueError):
    """A recipe or an option has an unknown key or a value outside its range."""


class UnknownModelError(RTMDetGeoError, ValueError):
    """No model of that name is in the catalogue, and no file has that path."""


class UnknownClassError(RTMDetGeoError, ValueError):
    """A class name was asked for that the model does not know."""


class ModelFileError(RTMDetGeoError, OSError):
    """A model file is missing, corrupt, or does not follow the model-file contract."""


class WeightsError(RTMDetGeoError, OSError):
    """Weights do not fit the network: missing, unexpected or wrongly shaped keys."""


class ChecksumError(WeightsError):
    """A file's SHA-256 is not the one it should have."""


class DownloadError(RTMDetGeoError, OSError):
    """A file cannot be fetched; the message says which file to put where instead."""


class RasterError(RTMDetGeoError, OSError):
    """A scene cannot be opened or read."""


class BandError(RTMDetGeoError, ValueError):
    """A band was asked for that the scene does not have."""


class ResolutionError(RTMDetGeoError, ValueError):
    """The scene's ground sample distance is too far from what the model was trained on."""


class DatasetNotFoundError(RTMDetGeoError, FileNotFoundError):
    """Training or evaluation data are not where the recipe says."""


class AnnotationError(RTMDetGeoError, ValueError):
    """A label file is malformed."""


class OutputError(RTMDetGeoError, OSError):
    """An output cannot be written, or exists and overwriting was not asked for."""


class MissingDependencyError(RTMDetGeoError, ImportError):
    """An optional package is needed; the message names the extra that brings it."""


class ExportMismatchError(RTMDetGeoError):
    """An exported graph does not give what the torch model gives."""


class DeviceMemoryError(RTMDetGeoError, MemoryError):
    """The memory of a device is too small for a batch."""


class EngineError(RTMDetGeoError, RuntimeError):
    """An engine cannot be built, loaded or run on this machine."""


class TrainingError(RTMDetGeoError, RuntimeError):
    """Training cannot go on (a loss that is not finite, a checkpoint of another recipe)."""


class Cancelled(RTMDetGeoError):  # noqa: N818 - it is no error, it is the user's wish
    """The caller's ``cancelled()`` answered True; nothing was left under the final name.

    Attributes:
        partial: file that holds what was found until then, or None.
    """

    def __init__(self, message: str = "", partial: str | None = None) -> None:
        """Remember what is left."""
        super().__init__(message)
        self.partial = partial


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class RTMDetGeoWarning(UserWarning):
    """Base of all warnings issued by rtmdet_geo."""


class NotGeoreferencedWarning(RTMDetGeoWarning):
    """The scene has no CRS: results are in pixels and the metric attributes are null."""


class ResolutionWarning(RTMDetGeoWarning):
    """The scene's ground sample distance is outside 0.5-2x the model's."""


class BandWarning(RTMDetGeoWarning):
    """Bands were repeated, guessed or filled in because the scene lacks what the model wants."""


class GeometryWarning(RTMDetGeoWarning):
    """Polygons that were given are not valid and were repaired."""


class NodataWarning(RTMDetGeoWarning):
    """The scene holds no valid pixel."""


class BatchHalvedWarning(RTMDetGeoWarning):
    """A device's memory was too small for a batch; smaller ones are run from there on."""


class PaddedTileWarning(RTMDetGeoWarning):
    """A scene is smaller than the only tile size that a model file takes."""


class SaturatedTileWarning(RTMDetGeoWarning):
    """A tile held more candidates above the score threshold than the model file can return."""
