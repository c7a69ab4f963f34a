"""Label files as plain arrays: DOTA, HRSC, COCO, YOLO, VOC. numpy only; no raster or GIS library."""
