"""SAHI's slicing with our model: ``python sahi_slicing.py TASK.json``, where SAHI is installed, not our package.

The adapter is what SAHI asks of a model: run a slice, tell its objects. It gives SAHI every object as its axis-aligned
box, by which SAHI merges, and as four corners, as SAHI's own adapter of rotated boxes does, after NMS of rotated boxes
in the slice (OpenCV's, which SAHI needs anyway), without which no detector hands on its objects. Slicing, reading and
merging are SAHI's. As with us, onnxruntime's waiting threads sleep.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
from processes import report
from sahi import __version__
from sahi.models.base import DetectionModel
from sahi.predict import get_sliced_prediction
from sahi.prediction import ObjectPrediction


class OnnxModel(DetectionModel):
    """A model file of ours for SAHI; ``task`` has its thresholds, threads and the value of a missing fourth band."""

    def __init__(self, task):
        self.task = task
        super().__init__(model_path=task["model"], confidence_threshold=task["score_threshold"], device="cpu")

    def load_model(self):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.task["threads"]
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.model = onnxruntime.InferenceSession(self.model_path, options, providers=["CPUExecutionProvider"])

    def perform_inference(self, image):
        infrared = np.full(image.shape[:2], self.task["infrared"], np.uint8)
        images = np.concatenate([image.transpose(2, 0, 1), infrared[None]])[None]
        boxes, scores, labels = self.model.run(["boxes", "scores", "labels"], {"images": images})
        keep = scores[0] >= self.confidence_threshold
        self._original_predictions = boxes[0][keep], scores[0][keep], labels[0][keep]

    def _create_object_prediction_list_from_original_predictions(self, shift_amount_list=None, full_shape_list=None):
        shift, shape = (shift_amount_list or [[0, 0]])[0], (full_shape_list or [None])[0]
        boxes, scores, labels = self._original_predictions
        turned = [((x, y), (w, h), np.degrees(angle)) for x, y, w, h, angle in boxes.astype(float).tolist()]
        limits = self.confidence_threshold, self.task["iou_threshold"]
        kept = cv2.dnn.NMSBoxesRotated(turned, scores.tolist(), *limits) if turned else []
        objects = []
        for index in np.ravel(kept).astype(int):
            corners = cv2.boxPoints(turned[index])
            objects.append(
                ObjectPrediction(
                    bbox=[*corners.min(axis=0).clip(0).tolist(), *corners.max(axis=0).tolist()],
                    category_id=int(labels[index]),
                    category_name="ship",
                    segmentation=[corners.ravel().tolist()],
                    score=float(scores[index]),
                    shift_amount=shift,
                    full_shape=shape,
                )
            )
        self._object_prediction_list_per_image = [objects]


def main():
    """Detect, write COCO json, report."""
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    slices = 0

    def count(done, _):
        nonlocal slices
        slices = done

    start = time.perf_counter()
    ratio = task["overlap"] / task["tile_size"]
    result = get_sliced_prediction(
        task["scene"],
        OnnxModel(task),
        slice_height=task["tile_size"],
        slice_width=task["tile_size"],
        overlap_height_ratio=ratio,
        overlap_width_ratio=ratio,
        perform_standard_pred=False,
        postprocess_type="NMS",
        postprocess_match_metric="IOU",
        postprocess_match_threshold=task["iou_threshold"],
        progress_callback=count,
        verbose=0,
    )
    Path(task["output"]).write_text(json.dumps(result.to_coco_annotations()), encoding="utf-8")
    seconds = round(time.perf_counter() - start, 2)
    report(
        seconds=seconds,
        tiles=slices,
        objects=len(result.object_prediction_list),
        version=__version__,
        onnxruntime=onnxruntime.__version__,
    )


if __name__ == "__main__":
    main()
