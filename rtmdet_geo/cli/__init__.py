"""The ``rtmdet-geo`` command: one group, one file per verb, shared options in options.py.

Nothing heavy is imported here: ``rtmdet-geo --help`` loads neither torch nor rasterio, nor numpy.

Exit codes: 0 done (nothing found is done too) · 1 error, one line on stderr · 2 the command line itself is wrong ·
3 ran, but the verdict is no (an export that does not match) · 130 cancelled.
"""

from __future__ import annotations

from rtmdet_geo.cli.group import cli, main

__all__ = ["cli", "main"]
