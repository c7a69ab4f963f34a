"""Label files as plain arrays: DOTA, HRSC2016, COCO, YOLO, rotated boxes. No raster or GIS library, no torch."""
