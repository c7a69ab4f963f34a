"""DOTA from images to submission: split into patches, run a model over them, merge, pack and check the zip."""
