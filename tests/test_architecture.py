"""The arrows between the rooms, read from the sources: who may import whom, and where heavy packages live."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rtmdet_geo"
MAX_LINES = 500

# Rooms from the bottom up. A new module gets its place here, deliberately.
BASE = {
    *("__init__", "errors", "structures", "config"),
    *("cache", "catalog", "checkpoints", "class_names", "cores", "recipe_sections", "variants"),
}
STAGES = {
    *("boxes", "jit", "nms", "quads", "annotations", "gis_convert", "gis_labels", "label_layers", "tiles"),
    *("area", "raster", "bands", "geodesy", "georeference", "resample", "scene", "scene_tags", "sentinel2"),
    *("gdal_options", "mosaic", "stretch", "stretch_options"),
    *("merge", "merge_methods", "merge_rows", "pyramid", "scene_features", "suppression"),
    *("vector", "vector_formats", "cells", "preview", "preview_html", "outputs", "evaluation"),
    *("qgis_style", "vector_drivers", "vector_pixels", "vector_tables", "vector_texts"),
    *("charts", "contact_sheet", "dataset_charts", "dataset_check", "dataset_stats", "masks", "pictures", "polygons"),
    *("journal", "prefetch", "preprocess", "run_record", "stitch", "strips", "views"),
}
BACKENDS = {"backends"}
ONNX = {"export.fold", "export.graph", "export.half", "export.operators"}  # rewrites of graphs
TORCH_ENGINES = {"backends.pytorch", "backends.pytorch_classify"}
# What each room may import. Longest match wins: "backends.pytorch" has its own line.
ALLOWED: dict[str, set[str]] = {
    **dict.fromkeys(BASE, BASE),
    **dict.fromkeys(STAGES, BASE | STAGES),
    "models": BASE | STAGES | {"models"},
    "training": BASE | STAGES | {"models", "training"},
    "backends": BASE | STAGES | BACKENDS,
    "backends.pytorch": BASE | STAGES | BACKENDS | {"models"},
    "backends.trt_graph": BASE | STAGES | BACKENDS | ONNX,
    "backends.trt_check": BASE | STAGES | BACKENDS | {"export.check", "export.tiles"},
    "backends.pytorch_classify": BASE | STAGES | BACKENDS | {"models"},
    **dict.fromkeys(ONNX, BASE | ONNX),
    "export": BASE | STAGES | BACKENDS | {"export"},
    "export.check": BASE | BACKENDS | ONNX,
    "export.tiles": BASE | STAGES,
    "export.trace": BASE | STAGES | BACKENDS | {"export", "models"},
    "tile_loop": BASE | STAGES | BACKENDS,
    "detect": BASE | STAGES | BACKENDS | {"tile_loop", "detect_checks"},
    "detect_checks": BASE | STAGES | BACKENDS | {"tile_loop"},
    "images": BASE | STAGES | BACKENDS | {"tile_loop"},
    "classify": BASE | STAGES | BACKENDS,
    "dota": BASE | STAGES | BACKENDS | {"dota", "images"},
    "model_evaluation": BASE | STAGES | BACKENDS | {"dota", "images"},
    "batch": BASE | STAGES | BACKENDS | {"detect", "batch"},
    "cli": BASE
    | STAGES
    | BACKENDS
    | {"detect", "images", "classify", "dota", "model_evaluation", "batch", "cli", "training", "export"},
    "__main__": {"cli"},
}
# Packages that only the named rooms may import, at any depth of the code.
CONFINED: dict[str, set[str]] = {
    "torch": {"models", "training", "export.trace", "backends.pytorch"},
    "tensorboard": {"training"},
    "matplotlib": {"charts", "evaluation", "training"},
    "faster_coco_eval": {"evaluation"},
    "rasterio": {"raster", "gis_labels", "vector", "preview"},
    "onnx": {"backends.trt_graph", "export"},
    "onnxruntime": {"backends", "export.quantize"},
    "openvino": {"backends.openvino_rt"},
    "tensorrt": {"backends.trt_load"},
    "cuda": {"backends.cuda"},
    "click": {"cli"},
    "rich": {"cli"},
    "data_tools": set(),
    "qgis": set(),
}
# Training runs where these are not installed; nothing that it imports on the way may need them.
NOT_FOR_TRAINING = {"rasterio", "shapely", "geopandas", "pyogrio", "pyarrow", "pyproj", "onnxruntime", "click", "rich"}
NOT_FOR_TRAINING |= {"openvino"}


@dataclass(frozen=True)
class Import:
    """One imported module: absolute dotted name, line, and whether importing the file executes it."""

    name: str
    line: int
    at_import: bool


def module_name(path: Path, package: Path = PACKAGE) -> str:
    """Return the dotted name below the package: ``models.heads``; a folder's ``__init__`` has the folder's name."""
    parts = list(path.relative_to(package).with_suffix("").parts)
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


def sources() -> dict[str, str]:
    """Return the text of each module by its name."""
    return {module_name(path): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def is_type_checking(node: ast.AST) -> bool:
    """Say whether ``node`` is ``if TYPE_CHECKING:``."""
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports_of(text: str, module: str, *, is_folder: bool = False) -> list[Import]:
    """Return what the module imports, ``if TYPE_CHECKING`` left out; relative imports are made absolute."""
    package_parts = ["rtmdet_geo", *([] if module == "__init__" else module.split("."))]
    if not is_folder and module != "__init__":
        package_parts.pop()
    found: list[Import] = []

    def visit(node: ast.AST, at_import: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend(Import(alias.name, child.lineno, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                head = package_parts[: len(package_parts) - child.level + 1] if child.level else []
                base = ".".join([*head, *([child.module] if child.module else [])])
                found.extend(Import(f"{base}.{alias.name}", child.lineno, at_import) for alias in child.names)
            elif (
                isinstance(child, ast.Call)
                and ast.unparse(child.func) in {"importlib.import_module", "import_module", "__import__"}
                and child.args
                and isinstance(child.args[0], ast.Constant)
            ):
                found.append(Import(str(child.args[0].value), child.lineno, at_import))
            if is_type_checking(child):
                for other in child.orelse:  # type: ignore[attr-defined]
                    visit(ast.Module([other], []), at_import)
                continue
            visit(child, at_import and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(ast.parse(text), True)
    return found


def room_of(module: str, table: dict[str, set[str]] = ALLOWED) -> str | None:
    """Return the longest prefix of ``module`` that has a line in ``table``."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if (name := ".".join(parts[:length])) in table:
            return name
    return None


def is_inside(module: str, rooms: set[str]) -> bool:
    """Say whether ``module`` is one of ``rooms`` or lies in one."""
    return any(module == room or module.startswith(room + ".") for room in rooms)


def arrow_faults(module: str, imports: list[Import]) -> list[str]:
    """Return one line per import that breaks a rule."""
    room = room_of(module)
    if room is None:
        return [f"{module}: has no place in ALLOWED of tests/test_architecture.py; give it one"]
    faults = []
    for item in imports:
        where = f"{module}:{item.line} imports {item.name}"
        top = item.name.split(".")[0]
        if top in CONFINED and not is_inside(module, CONFINED[top]):
            faults.append(f"{where}: {top} belongs to {sorted(CONFINED[top])} only")
        if top == "rtmdet_geo":
            target = item.name.removeprefix("rtmdet_geo").lstrip(".") or "__init__"
            if target.split(".")[0].startswith("__"):
                continue  # rtmdet_geo.__version__
            if not is_inside(target, ALLOWED[room]):
                faults.append(f"{where}: against the arrows, {room} may import {sorted(ALLOWED[room])}")
            if item.at_import and is_inside(target, TORCH_ENGINES) and not is_inside(module, TORCH_ENGINES):
                faults.append(f"{where}: loads torch; import it inside the function that needs it")
    return faults


def resolve(name: str, modules: set[str]) -> str | None:
    """Return the package's module that ``name`` (``rtmdet_geo.boxes.project_boxes``) loads."""
    parts = name.split(".")[1:] if name.split(".")[0] == "rtmdet_geo" else []
    while parts:
        if ".".join(parts) in modules:
            return ".".join(parts)
        parts.pop()
    return None


def reach(start: str, texts: dict[str, str]) -> dict[str, list[str]]:
    """Return every top-level package that importing ``start`` executes, each with the path of modules to it."""
    folders = {module_name(path) for path in PACKAGE.rglob("__init__.py")}
    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    stack = [(start, [start])]
    while stack:
        module, path = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        for item in imports_of(texts[module], module, is_folder=module in folders):
            if not item.at_import:
                continue
            target = resolve(item.name, set(texts))
            if target is None:
                found.setdefault(item.name.split(".")[0], path)
                continue
            parents = [".".join(target.split(".")[:length]) for length in range(1, target.count(".") + 1)]
            stack.extend((name, [*path, name]) for name in [*parents, target] if name in texts)
    return found


def print_faults(module: str, text: str) -> list[str]:
    """Return the lines that print or exit; both belong to the command line."""
    if is_inside(module, {"cli"}):
        return []
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    names = {"print", "sys.exit", "exit", "os._exit"}
    called = [(call.lineno, ast.unparse(call.func)) for call in calls]
    return [f"{module}:{line} calls {name}" for line, name in called if name in names]


def find_cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the import cycles, each as the path that closes."""
    cycles: list[list[str]] = []
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> None:
        if node in path:
            cycles.append([*path[path.index(node) :], node])
            return
        if node in done:
            return
        for target in sorted(graph.get(node, ())):
            walk(target, [*path, node])
        done.add(node)

    for node in sorted(graph):
        walk(node, [])
    return cycles


TEXTS = sources()
FOLDERS = {module_name(path) for path in PACKAGE.rglob("__init__.py")}


@pytest.mark.parametrize("module", sorted(TEXTS))
def test_arrows(module):
    faults = arrow_faults(module, imports_of(TEXTS[module], module, is_folder=module in FOLDERS))
    assert not faults, "\n".join(faults)


def test_no_import_cycles():
    graph = {
        module: {
            target
            for item in imports_of(text, module, is_folder=module in FOLDERS)
            if item.at_import and (target := resolve(item.name, set(TEXTS))) and target != module
        }
        for module, text in TEXTS.items()
    }
    assert find_cycles(graph) == []


@pytest.mark.parametrize("module", sorted(name for name in TEXTS if is_inside(name, {"training", "models"})))
def test_training_needs_no_gdal(module):
    faults = {name: path for name, path in reach(module, TEXTS).items() if name in NOT_FOR_TRAINING}
    assert not faults, f"importing {module} loads " + "; ".join(f"{n} by {' > '.join(p)}" for n, p in faults.items())


@pytest.mark.parametrize("module", sorted(TEXTS))
def test_library_neither_prints_nor_exits(module):
    assert print_faults(module, TEXTS[module]) == []


@pytest.mark.parametrize("module", sorted(TEXTS))
def test_a_reader_can_hold_the_file(module):
    assert len(TEXTS[module].splitlines()) <= MAX_LINES


def test_no_public_name_is_a_module():
    import rtmdet_geo

    modules = {name.split(".")[0] for name in TEXTS}
    assert modules.isdisjoint(rtmdet_geo.__all__)


@pytest.mark.parametrize(
    ("module", "text", "part"),
    [
        ("raster", "import torch", "torch belongs to"),
        ("detect", "def f():\n    import torch.nn as nn", "torch belongs to"),
        ("cli.train", "from torch import nn", "torch belongs to"),
        ("training.loop", "import rasterio", "rasterio belongs to"),
        ("boxes", "from rasterio.windows import Window", "rasterio belongs to"),
        ("structures", "from rtmdet_geo.boxes import box_areas", "against the arrows"),
        ("merge", "from rtmdet_geo import detect", "against the arrows"),
        ("tiles", "def f():\n    from .backends import open_backend", "against the arrows"),
        ("backends.onnxrt", "from rtmdet_geo.models import rtmdet", "against the arrows"),
        ("detect", "from rtmdet_geo.cli.options import x", "against the arrows"),
        ("models.heads", "from ..training import losses", "against the arrows"),
        ("models.heads", "from rtmdet_geo.training import losses", "against the arrows"),
        ("vector", "import importlib\nimportlib.import_module('torch')", "torch belongs to"),
        ("raster", "from data_tools import convert", "data_tools belongs to"),
        ("detect", "from rtmdet_geo.backends.pytorch import PyTorchBackend", "loads torch"),
        ("backends.onnxrt", "def f():\n    import openvino", "openvino belongs to"),
        ("helpers", "import numpy", "has no place"),
    ],
)
def test_a_forbidden_import_is_found(module, text, part):
    faults = arrow_faults(module, imports_of(text, module))
    assert len(faults) == 1
    assert part in faults[0]


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("models.heads", "import torch\nfrom .blocks import ConvModule"),
        ("backends.pytorch", "import torch\nfrom rtmdet_geo.models import rtmdet"),
        ("raster", "import rasterio\nfrom rtmdet_geo import __version__"),
        ("boxes", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("cli.detect", "def f():\n    from rtmdet_geo.detect import detect_scene"),
        ("backends", "def f():\n    from rtmdet_geo.backends.pytorch import PyTorchBackend"),
    ],
)
def test_an_allowed_import_passes(module, text):
    assert arrow_faults(module, imports_of(text, module)) == []


def test_reach_sees_what_is_imported_on_the_way():
    texts = {
        "training": "from rtmdet_geo.boxes import area",
        "boxes": "from rtmdet_geo import vector\ndef f():\n    import pyarrow",
        "vector": "import geopandas",
    }
    assert reach("training", texts) == {"geopandas": ["training", "boxes", "vector"]}


def test_a_cycle_is_found():
    assert find_cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == [["a", "b", "c", "a"]]
    assert find_cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_a_print_is_found():
    assert print_faults("merge", "def f():\n    print('x')") == ["merge:2 calls print"]
    assert print_faults("merge", "import sys\nsys.exit(1)") == ["merge:2 calls sys.exit"]
    assert print_faults("cli.detect", "print('x')") == []
