"""Score ships found in HRSC2016: AP by VOC07 (11 points) and by VOC12 (area), as published figures have it.

python -m data_tools.eval_hrsc results/Task1_ship.txt Test/Annotations
python -m data_tools.eval_hrsc results labels --points voc12 --json

results/Task1_ship.txt: a line "image score x1 y1 x2 y2 x3 y3 x4 y4" a ship; or the folder of it.
Test/Annotations: folder of HRSC2016's XML files, or of text files with a line "cx cy w h angle" (px, rad) a ship; each
is an image that was searched.

The same as `rtmdet-geo evaluate hrsc`, whose --help explains the options.
"""

from __future__ import annotations

import sys

from rtmdet_geo.cli import main

if __name__ == "__main__":
    main(["evaluate", "hrsc", *sys.argv[1:]])
