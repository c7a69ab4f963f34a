"""Speed of the engines on a GPU: ``python tests/benchmarks/gpu.py [--models A,B] [--sections A,B] [--output FILE]``.

Needs torch, numpy and this package with what `rtmdet-geo[train]` installs; no rasters, no network. Engines that run
model files need `onnx` for the export as well. Networks are untrained, with seeded weights whose activations have been
normalised, so that every layer computes with numbers of the usual size and some hundred boxes a tile are found.

Each engine is first compared with torch in fp32 on the CPU (batch norms not folded): boxes in px and scores of all
detections above a threshold. One that differs by more than its precision may is marked, and the exit status is 1.
Then, on tiles of the published sizes, all of it from pixels in the host's memory to rows in the host's memory:

- latency: a batch of one, the median and the 95th percentile;
- throughput: the best over growing batches, copies and runs overlapping where the engine can;
- both with NMS too: on the host as the pipeline does it (without drawing masks), for torch also on the device.

Opening an engine (a TensorRT build among it) and the first batch of each shape (captures, torch.compile) have columns
of their own. Weights, model files, TensorRT engines and compiled kernels are kept in --cache. A section ends after
--minutes and says what it left out; the next run finds in the cache what this one has made. Rows are written as they
come. TensorRT has an engine for one tile and another for large batches, as it tunes an engine for one size.

Sections: numerics (the comparison), torch-eager, torch-graphs, torch-compile, onnxruntime, tensorrt, and nms: engines
with NMS, and NMS alone on the same candidates on the host and on the device, which must keep the same boxes.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import importlib.metadata
import itertools
import os
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "gpu.csv"
sys.path.insert(0, str(ROOT))

from untrained import TOLERANCES, Reference, draw_tiles, make_weights  # noqa: E402

from rtmdet_geo.backends.contract import rows_to_detections  # noqa: E402
from rtmdet_geo.backends.engines import list_engines  # noqa: E402
from rtmdet_geo.backends.pytorch import TorchBackend  # noqa: E402
from rtmdet_geo.errors import BatchHalvedWarning, ConfigError, MissingDependencyError, SaturatedTileWarning  # noqa: E402
from rtmdet_geo.models.devices import is_out_of_memory  # noqa: E402
from rtmdet_geo.models.nms_torch import nms_rotated_batch  # noqa: E402
from rtmdet_geo.nms import nms_of_kind  # noqa: E402
from rtmdet_geo.variants import NMS_IOU_THRESHOLDS  # noqa: E402

MODELS = ("rtmdet_tiny", "rtmdet_l", "rtmdet_ins_tiny", "rtmdet_ins_l", "rtmdet_r_tiny", "rtmdet_r_l")
#: Precisions of the engines of each section, in the order in which they are run; what may be left out comes last.
ENGINES = {
    "torch-eager": ("fp32", "fp16"),
    "torch-graphs": ("fp32", "fp16", "bf16"),
    "torch-compile": ("fp16", "fp32"),
    "onnxruntime": ("fp32",),
    "tensorrt": ("fp16",),
}
SECTIONS = ("numerics", *ENGINES, "nms")
BASELINE = ("torch-eager", "fp32")
#: The one large batch that is compiled; each costs up to a minute.
COMPILED_BATCH = 8
#: Published milliseconds of TensorRT 8.4.3 in FP16, batch 1, and the GPU. Horizontal boxes and instances: README of
#: configs/rtmdet in MMDetection 3.x (boxes without NMS; instances with the masks of the best 100). Rotated boxes:
#: README of configs/rotated_rtmdet in MMRotate 1.x (without NMS).
PUBLISHED = {
    **{f"rtmdet_{size}": ms for size, ms in {"tiny": 0.98, "s": 1.22, "m": 1.62, "l": 2.44, "x": 3.10}.items()},
    **{f"rtmdet_ins_{size}": ms for size, ms in {"tiny": 1.70, "s": 1.93, "m": 2.69, "l": 3.68, "x": 5.31}.items()},
    **{f"rtmdet_r_{size}": ms for size, ms in {"tiny": 4.40, "s": 4.86, "m": 7.82, "l": 10.82}.items()},
}
COLUMNS = (
    *("model", "side", "engine", "precision", "nms", "measure", "batch", "status"),
    *("median_ms", "p95_ms", "images_per_s", "mpx_per_s", "times_eager_fp32", "times_published", "published_ms"),
    *("published_gpu", "open_s", "first_s", "boxes_px", "scores", "detections"),
    *("gpu", "driver", "cpu", "python", "torch", "cuda", "cudnn", "onnxruntime", "tensorrt", "date"),
)


class LeftOut(Exception):
    """An engine that this machine does not have, or for which no time is left."""


def parse(arguments):
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = {"type": lambda text: tuple(text.split(","))}
    parser.add_argument("--models", default=MODELS, help="names of builders, with commas between", **words)
    parser.add_argument("--sections", default=SECTIONS, help="see above, with commas between", **words)
    numbers = {"type": lambda text: tuple(map(int, text.split(",")))}
    parser.add_argument("--batches", help="sizes beside 1, with commas between: 2,4,8,16,32", **numbers)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to try this script")
    parser.add_argument(
        "--output", type=Path, help=f"CSV to write; of a GPU {RESULTS.name} in tests/benchmarks/results"
    )
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "rtmdet_geo_gpu_benchmark")
    parser.add_argument("--minutes", type=float, default=8.0, help="most of each section")
    parser.add_argument("--quick", action="store_true", help="tiles of 128 px, few runs: does it work?")
    options = parser.parse_args(arguments)
    options.batches = options.batches or ((2,) if options.quick else (2, 4, 8, 16, 32))
    options.batches = tuple(sorted({1, *options.batches}))
    for given, known, what in ((options.sections, SECTIONS, "sections"), (options.batches, range(1, 10**4), "batches")):
        if unknown := [str(name) for name in given if name not in known]:
            parser.error(f"--{what}: no such: {', '.join(unknown)}")
    if options.output is None and options.device != "cpu":
        options.output = RESULTS
    return options


# ---------------------------------------------------------------- engines


def make_model_file(weights):
    """Return the model file made from weights, exported if it is not there."""
    path = weights.with_suffix(".onnx")
    if not path.is_file():
        from rtmdet_geo.export import export_model

        export_model(weights, path, verify=False)
    return path


def open_engine(section, precision, weights, options, most):
    """Return an engine for at most so many tiles at once.

    Raises:
        LeftOut: this machine does not have it.
        Exception: whatever goes wrong in it.
    """
    is_cpu = options.device == "cpu"
    if is_cpu and (section in ("torch-graphs", "tensorrt") or precision == "fp16"):
        raise LeftOut("needs a CUDA device")
    if section.startswith("torch"):
        try:
            return TorchBackend(
                weights,
                device=options.device,
                precision=precision,
                cuda_graphs=section != "torch-eager",
                compiled=section == "torch-compile",
            )
        except ConfigError as error:  # no bf16
            raise LeftOut(str(error)) from error
    try:
        if section == "onnxruntime":
            from rtmdet_geo.backends.onnxrt import OnnxRuntimeBackend

            if not is_cpu and not has_onnxruntime_gpu():
                raise LeftOut("onnxruntime-gpu is not installed")
            return OnnxRuntimeBackend(make_model_file(weights), device=options.device)
        importlib.import_module("tensorrt")
        from rtmdet_geo.backends.trt import TensorRtBackend

        return TensorRtBackend(make_model_file(weights), device=options.device, precision=precision, max_batch=most)
    except (ImportError, MissingDependencyError) as error:
        raise LeftOut(str(error)) from error


def has_onnxruntime_gpu():
    """Say whether an onnxruntime that knows CUDA is installed."""
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


# ---------------------------------------------------------------- measuring


class Clock:
    """How often and how long to measure, and when a section must end."""

    def __init__(self, options):
        self.seconds, self.fewest, self.most = (0.1, 3, 5) if options.quick else (3.0, 20, 500)
        self.minutes = options.minutes
        self.start()

    def start(self):
        """Begin a section."""
        self.end = time.perf_counter() + 60 * self.minutes

    def check(self):
        """Raise LeftOut when the section's time is up."""
        if time.perf_counter() > self.end:
            raise LeftOut(f"no time was left of {self.minutes:g} minutes")

    def repeat(self, run):
        """Return the seconds of each of many runs."""
        seconds = []
        while len(seconds) < self.fewest or (sum(seconds) < self.seconds and len(seconds) < self.most):
            self.check()
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return np.array(seconds)


def latency(clock, run):
    """Return the columns of a run's latency; a run ends when its results are in the host's memory."""
    seconds = clock.repeat(run)
    median, p95 = (1000 * float(np.percentile(seconds, q)) for q in (50, 95))
    return {"median_ms": round(median, 3), "p95_ms": round(p95, 3)}


def throughput(clock, stream, images):
    """Return images per second of a stream of equal batches."""
    batches = clock.fewest
    start = time.perf_counter()
    stream(itertools.repeat(images, batches))
    rate = batches / (time.perf_counter() - start)
    batches = int(np.clip(rate * clock.seconds, clock.fewest, clock.most))
    start = time.perf_counter()
    stream(itertools.repeat(images, batches))
    return batches * len(images) / (time.perf_counter() - start)


def with_nms(engine, where, threshold):
    """Return what takes batches through an engine and NMS and throws the boxes away.

    Args:
        engine: see the protocol.
        where: "none", "host" or "device" (torch).
        threshold: of scores.
    """
    kind = engine.spec.object_kind
    iou = NMS_IOU_THRESHOLDS[kind]

    def none(batches):
        for _ in engine.stream(batches, multi_label=False):
            pass

    def host(batches):
        for found in engine.run(batches, score_threshold=threshold):
            for one in found:
                nms_of_kind(one.boxes, one.scores, one.labels, kind=kind, iou_threshold=iou)

    def device(batches):
        for images in batches:
            outputs = engine.raw_on_device(torch.from_numpy(images).to(engine.device), multi_label=False)
            kept = nms_rotated_batch(
                *outputs[:3], score_threshold=threshold, iou_threshold=iou, is_strict=kind != "rotated"
            )
            for output in outputs[:3]:
                output[kept].cpu()

    return {"none": none, "host": host, "device": device}[where]


# ---------------------------------------------------------------- the table


class Table:
    """Rows for the CSV and the terminal, written as they come."""

    def __init__(self, options, files):
        self.options = options
        self.machine = describe(options.device)
        self.num_wrong = 0
        self.baselines = {}
        self.writer = None
        if options.output is not None:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            file = files.enter_context(options.output.open("w", newline="", encoding="utf-8", buffering=1))
            self.writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            self.writer.writeheader()

    def add(self, case, *, status="ok", **values):
        """Write a row: rates from its milliseconds or the other way round, and ratios."""
        row = {**case, "status": " ".join(status.split()), **values}
        if "images_per_s" in row:
            row["median_ms"] = round(1000 * row["batch"] / row["images_per_s"], 3)
        elif "median_ms" in row:
            row["images_per_s"] = 1000 * row["batch"] / row["median_ms"]
        if "images_per_s" in row and row["engine"] != "nms":
            key = (row["model"], row["measure"], row["nms"] != "none")
            if (row["engine"], row["precision"]) == BASELINE and row["nms"] != "device":
                self.baselines[key] = max(row["images_per_s"], self.baselines.get(key, 0))
            if key in self.baselines:
                row["times_eager_fp32"] = round(row["images_per_s"] / self.baselines[key], 2)
            published = PUBLISHED.get(row["model"])
            if published is not None:
                row["published_ms"] = published
                row["published_gpu"] = "RTX 2080 Ti" if row["model"].startswith("rtmdet_r_") else "RTX 3090"
                row["times_published"] = round(row["images_per_s"] * published / 1000, 2)
        if "images_per_s" in row:
            row["mpx_per_s"] = round(row["images_per_s"] * row["side"] ** 2 / 1e6, 1)
            row["images_per_s"] = round(row["images_per_s"], 2)
        if self.writer is not None:
            self.writer.writerow({**row, **self.machine})
        shown = [f"{row['model']:16}", f"{row['engine']:14}", f"{row['precision']:5}", f"nms {row['nms']:7}"]
        shown += [f"{row['measure']:11}", f"batch {row['batch']!s:3}" if row.get("batch") else " " * 9]
        for name in (
            "median_ms",
            "p95_ms",
            "images_per_s",
            "times_eager_fp32",
            "open_s",
            "first_s",
            "boxes_px",
            "scores",
        ):
            if name in row:
                shown.append(f"{name} {row[name]:g}")
        print(*shown, "" if row["status"] == "ok" else row["status"].upper(), flush=True)


def describe(device):
    """Return the columns of the machine."""
    machine = list_engines().machine
    row = {"cpu": machine["cpu"], "python": machine["python"], "torch": torch.__version__, "cuda": torch.version.cuda}
    for package in ("onnxruntime", "tensorrt"):
        row[package] = next(
            (
                f"{importlib.metadata.version(name)}{name.removeprefix(package).replace('-', ' ')}"
                for name in (f"{package}-gpu", f"{package}-cu13", f"{package}-cu12", package)
                if is_installed(name)
            ),
            "",
        )
    if device != "cpu":
        row["gpu"] = torch.cuda.get_device_name(device)
        row["cudnn"] = torch.backends.cudnn.version()
        row["driver"] = "; ".join(sorted({gpu.split(",")[1].strip() for gpu in machine["gpus"]}))
    row["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    return row


def is_installed(package):
    """Say whether a package's metadata are there."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


# ---------------------------------------------------------------- the run


@contextmanager
def reported(table, case):
    """Turn whatever goes wrong into a row; a benchmark of one engine must not end that of the others."""
    try:
        yield
    except LeftOut as error:
        table.add(case, status=f"left out: {error}")
    except Exception as error:
        lines = str(error).strip().splitlines()
        is_memory = isinstance(error, MemoryError | BatchHalvedWarning) or is_out_of_memory(error)
        reason = "memory ended" if is_memory else f"failed: {type(error).__name__}: {lines[0] if lines else ''}"
        table.add(case, status=reason)


def run_engine(table, clock, reference, case, weights, options, sizes):
    """Open an engine, compare it and measure it.

    Args:
        table: to write to.
        clock: of the section.
        reference: of the network.
        case: columns that all its rows have.
        weights: file of the network's weights.
        options: of the command line.
        sizes: of batches; the first row is of one tile.
    """
    section = case["engine"]
    images = draw_tiles(max(2, *sizes), case["side"], seed=1)
    engine = None
    with reported(table, {**case, "nms": "none", "measure": "open"}):
        clock.check()
        start = time.perf_counter()
        engine = open_engine(section, case["precision"], weights, options, max(sizes))
        case = {**case, "open_s": round(time.perf_counter() - start, 2)}
    if engine is None:
        return
    if "numerics" in options.sections:
        at_once = 1 if section == "torch-compile" or max(sizes) == 1 else 2
        compared = {**case, "nms": "none", "measure": "numerics", "batch": at_once}
        with reported(table, compared):
            compare(table, compared, engine, reference, images[:2])
    if section not in options.sections:
        return
    places = ["none"]
    if "nms" in options.sections:
        places += ["host", "device"] if section.startswith("torch") else ["host"]
    for where in places:
        run = with_nms(engine, where, reference.threshold)
        if sizes[0] == 1:
            measure_latency(table, clock, {**case, "nms": where, "measure": "latency", "batch": 1}, run, images)
        measure_throughput(table, clock, {**case, "nms": where, "measure": "throughput"}, run, images, sizes)


def run_nms(table, clock, reference, case, options):
    """Measure NMS alone, on the candidates of eight tiles that lie where it runs."""
    kind, number = reference.kind, 8
    iou, threshold = NMS_IOU_THRESHOLDS[kind], reference.threshold
    rows = [np.concatenate([output] * (number // 2)) for output in reference.rows[:3]]
    there = [torch.from_numpy(output).to(options.device) for output in rows]

    def host():
        kept = []
        for row in zip(*rows, strict=True):
            one = rows_to_detections(*row, score_threshold=threshold, multi_label=True, kind="rotated")
            kept.append(len(nms_of_kind(one.boxes, one.scores, one.labels, kind=kind, iou_threshold=iou)))
        return kept

    def device():
        kept = nms_rotated_batch(*there, score_threshold=threshold, iou_threshold=iou, is_strict=kind != "rotated")
        return kept.sum(dim=1).tolist()

    kept = []
    for where, run in (("host", host), ("device", device)):
        with reported(table, {**case, "nms": where, "measure": "nms alone"}):
            start = time.perf_counter()
            kept.append(run())
            first = round(time.perf_counter() - start, 2)
            is_right = np.abs(np.subtract(kept[0], kept[-1])).max() <= 1  # one may lie at the threshold
            table.num_wrong += not is_right
            table.add(
                {**case, "nms": where, "measure": "nms alone", "batch": number},
                status="ok" if is_right else f"wrong: {kept[-1]} boxes are left, not {kept[0]}",
                first_s=first,
                detections=sum(kept[-1]),
                **latency(clock, run),
            )


def sizes_of_engines(section, batches):
    """Return the sizes of batches that each engine of a section is measured with, an engine after the other."""
    if section == "torch-compile":
        return [(1, *(batch for batch in batches if batch == COMPILED_BATCH))]
    if section == "tensorrt":
        return [(1,), *([larger] if (larger := tuple(batch for batch in batches if batch > 1)) else [])]
    return [batches]


def compare(table, case, engine, reference, images):
    """Write how far an engine is from the reference."""
    start = time.perf_counter()
    engine.raw(images[: case["batch"]], multi_label=False)
    first = round(time.perf_counter() - start, 2)
    px, score, number = reference.compare(engine, images, case["batch"])
    limits = TOLERANCES[engine.precision]
    is_right = number > 0 and px <= limits[0] and score <= limits[1]
    table.num_wrong += not is_right
    table.add(
        case,
        status="ok" if is_right else f"wrong: more than {limits[0]} px or {limits[1]} apart",
        first_s=first,
        boxes_px=round(float(px), 5),
        scores=round(float(score), 6),
        detections=number,
    )


def measure_latency(table, clock, case, run, images):
    """Write the latency of one tile."""
    with reported(table, case):
        start = time.perf_counter()
        run([images[:1]])
        first = round(time.perf_counter() - start, 2)
        table.add(case, first_s=first, **latency(clock, lambda: run([images[:1]])))


def measure_throughput(table, clock, case, run, images, batches):
    """Write the rate of each batch size until the memory ends or a larger batch is slower."""
    best = 0.0
    for batch in batches:
        has_ended = True
        with reported(table, {**case, "batch": batch}):
            clock.check()
            start = time.perf_counter()
            run([images[:batch]])
            first = round(time.perf_counter() - start, 2)
            rate = throughput(clock, run, images[:batch])
            table.add({**case, "batch": batch}, first_s=first, images_per_s=rate)
            has_ended = rate < 0.97 * best
            best = max(best, rate)
        if has_ended:
            return


def main(arguments=None):
    """Measure and write; 1 if an engine's numbers are wrong."""
    options = parse(arguments)
    if options.device != "cpu" and not torch.cuda.is_available():
        print("torch has no CUDA device here; --device cpu --quick tries the script", file=sys.stderr)
        return 1
    options.cache.mkdir(parents=True, exist_ok=True)
    for variable, folder in (("RTMDET_GEO_CACHE", "engines"), ("TORCHINDUCTOR_CACHE_DIR", "inductor")):
        os.environ.setdefault(variable, str(options.cache / folder))
    warnings.simplefilter("error", BatchHalvedWarning)
    warnings.simplefilter("ignore", SaturatedTileWarning)
    chosen = [name for name in ENGINES if name in options.sections]
    if not chosen and "numerics" in options.sections:
        chosen = list(ENGINES)  # the numbers of all of them, without timing
    if "nms" in options.sections:
        chosen.append("nms")
    clock = Clock(options)
    references = {}
    with ExitStack() as files:
        table = Table(options, files)
        for section in chosen:
            clock.start()
            for precision, model in itertools.product(ENGINES.get(section, ("fp64",)), options.models):
                side = 128 if options.quick else 1024 if model.startswith("rtmdet_r_") else 640
                case = {"model": model, "side": side, "engine": section, "precision": precision}
                with reported(table, {**case, "nms": "none", "measure": "weights"}):
                    weights = make_weights(model, side, options.cache)
                    if model not in references:
                        references[model] = Reference(weights, draw_tiles(2, side, seed=1))
                if model not in references:
                    continue
                if section == "nms":
                    run_nms(table, clock, references[model], case, options)
                    continue
                for sizes in sizes_of_engines(section, options.batches):
                    run_engine(table, clock, references[model], case, weights, options, sizes)
                    with reported(table, {**case, "nms": "none", "measure": "clear"}):
                        torch.compiler.reset()  # kernels of other networks count towards its limit
                        gc.collect()
                        if options.device != "cpu":
                            torch.cuda.empty_cache()
    if table.num_wrong:
        print(f"{table.num_wrong} engines give wrong numbers: see the rows that say so", file=sys.stderr)
    return 1 if table.num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
