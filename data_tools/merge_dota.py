"""Merge DOTA result files over patches into those over whole images.

python -m data_tools.merge_dota patch_results -o task1.zip --classes dota_v1.0

The same as `rtmdet-geo data merge`.
"""

from __future__ import annotations

import sys

from rtmdet_geo.cli import main

if __name__ == "__main__":
    main(["data", "merge", *sys.argv[1:]])
