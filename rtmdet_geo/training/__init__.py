"""Training: chips, augmentation, label assignment, losses, and one visible loop. torch; no rasterio."""
