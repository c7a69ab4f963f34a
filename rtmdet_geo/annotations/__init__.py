"""Label files as plain arrays: DOTA, HRSC2016, COCO, YOLO, VOC, rotated boxes. No raster or GIS library, no torch."""
