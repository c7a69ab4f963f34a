"""Convert label files of one format to another.

python -m data_tools.convert labelTxt -o train.json --from dota --to coco --images images

The same as ``rtmdet-geo data convert``, whose ``--help`` explains the options.
"""

from __future__ import annotations

from rtmdet_geo.cli import main

if __name__ == "__main__":
    import sys

    main(["data", "convert", *sys.argv[1:]])
