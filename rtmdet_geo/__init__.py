"""rtmdet-geo: RTMDet for satellite scenes. Pixels go in, georeferenced polygons come out.

Public names load on first use: importing the package loads neither torch nor rasterio.
"""

from __future__ import annotations

__version__ = "0.1.0"
