"""``python -m rtmdet_geo.cli`` is the ``rtmdet-geo`` command."""

from __future__ import annotations

from rtmdet_geo.cli import main

if __name__ == "__main__":
    main()
