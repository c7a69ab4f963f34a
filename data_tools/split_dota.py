"""Cut DOTA images and their labels into patches, by the rules of DOTA_devkit or BboxToolkit.

python -m data_tools.split_dota trainval/images -l trainval/labelTxt -o dota_ss/trainval --tool bboxtoolkit

The same as `rtmdet-geo data split`.
"""

from __future__ import annotations

import sys

from rtmdet_geo.cli import main

if __name__ == "__main__":
    main(["data", "split", *sys.argv[1:]])
