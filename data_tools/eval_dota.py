"""Score DOTA result files: AP per class and mean, by the rules of DOTA's development kit or of MMRotate.

python -m data_tools.eval_dota results val/labelTxt
python -m data_tools.eval_dota results val/labelTxt --task 2 --classes v1.5 --csv ap.csv --plots plots

results: folder of Task1_<class>.txt (lines "image score x1 y1 x2 y2 x3 y3 x4 y4") or, with --task 2, of
Task2_<class>.txt ("image score x1 y1 x2 y2"), one file for each class, also where nothing was found.
val/labelTxt: folder of labelTxt files of the whole images; each is an image that was searched.

It prints AP at IoU 0.5, 0.75 and from 0.5 to 0.95, by 11 points and by area. With --protocol devkit (the default) a hit
has more than the threshold, difficult objects count neither way, and the mean is over all classes, which gives the
figures of dota_evaluation_task1.py and dota_evaluation_task2.py; with --protocol mmrotate those of its DOTAMetric.

The same as `rtmdet-geo evaluate dota`, whose --help explains the options.
"""

from __future__ import annotations

import sys

from rtmdet_geo.cli import main

if __name__ == "__main__":
    main(["evaluate", "dota", *sys.argv[1:]])
