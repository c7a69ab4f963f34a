"""How good detections are. numpy; no torch, no rasterio."""
