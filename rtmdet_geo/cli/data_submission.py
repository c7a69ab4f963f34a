"""``rtmdet-geo data submission``: from a model and images to the zip that DOTA's server takes; and a check of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from rtmdet_geo.cli import options, report
from rtmdet_geo.cli.data_merge import chosen_classes, classes_options, task_option
from rtmdet_geo.cli.data_split import check_resume, rates_option, resume_option, tool_option
from rtmdet_geo.cli.group import EXIT_VERDICT_NO

#: What the tasks of DOTA score.
_SHAPES = {1: "oriented boxes", 2: "horizontal boxes"}


@click.command()
@click.argument("model")
@click.argument("images", type=click.Path(path_type=Path))
@options.output_option(
    ".zip file to submit, or folder of result files to make: Task 1 (oriented) of a model of rotated boxes, Task 2 "
    "(horizontal) of one of horizontal boxes or masks."
)
@click.option(
    "--task2",
    type=click.Path(path_type=Path),
    help="Write Task 2 of a model of rotated boxes too: .zip or folder of the boxes that enclose those of Task 1.",
)
@click.option("--patches", is_flag=True, help="IMAGES holds patches that `data split` made, not whole images.")
@tool_option("devkit; with --patches, as their names say")
@click.option("--size", type=click.IntRange(min=1), help="Side of patches in px.  [default: the model's tile size]")
@click.option(
    "--gap", type=click.IntRange(min=0), help="Px that neighbouring patches share.  [default: the model's overlap]"
)
@rates_option
@click.option(
    "--score",
    "score_threshold",
    type=click.FloatRange(0, 1),
    default=0.05,
    show_default=True,
    help="Keep detections with at least this score.",
)
@click.option(
    "--iou",
    "iou_threshold",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help="Detections of one class in a patch that overlap this much are one object.",
)
@click.option(
    "--merge-iou",
    "merge_iou_threshold",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help="The same between patches.",
)
@click.option(
    "--max-detections", type=click.IntRange(min=1), default=2000, show_default=True, help="Kept in each patch."
)
@click.option(
    "--multi-label/--one-label",
    default=True,
    show_default=True,
    help="Let one place have several classes, or the best.",
)
@options.batch_size_option("Patches")
@classes_options("the model's")
@options.engine_options
@resume_option
@options.overwrite_option
@options.json_option
@options.progress_option
@options.verbosity_options
@click.pass_context
def submission(
    ctx: click.Context,
    /,
    model: str,
    images: Path,
    output: Path,
    class_list: str | None,
    class_names: tuple[str, ...],
    backend: str,
    device: str,
    precision: str,
    compiled: bool,
    threads: int | None,
    as_json: bool,
    progress_mode: str,
    **settings: Any,
) -> None:
    """Run MODEL (name or file) over a folder of DOTA IMAGES, and write the zip that the evaluation server takes.

    \b
    Example:
      rtmdet-geo data submission rtmdet_r_tiny_dota test/images -o task1.zip
      rtmdet-geo data submission rtmdet_r_tiny_dota test/images -o task1.zip --task2 task2.zip --rates 0.5,1,1.5

    Images are cut, run, merged and packed, as `data split`, a test and `data merge` would do. Every class of the model
    and of --classes gets a file; of those that are empty there is a warning, and `data check-submission` says more. A
    stopped run leaves OUT.partial.
    """
    options.check_stdout_owner(as_json, progress_mode)
    check_resume(settings["resume"], settings["overwrite"])
    if None not in (settings["size"], settings["gap"]) and settings["gap"] >= settings["size"]:
        raise click.UsageError(f"--gap {settings['gap']} must be below --size {settings['size']}.")
    classes = chosen_classes(class_list, class_names)
    from rtmdet_geo.dota.files import find_images
    from rtmdet_geo.dota.inference import run_dota
    from rtmdet_geo.dota.submission import EMPTY_FILE, check_submission
    from rtmdet_geo.images import load_model

    start = {"model": model, "images": str(images), "out": str(output)}
    with report.signals_are_polled(), report.progress(ctx, progress_mode, "patches", start) as advance:
        engine = load_model(
            model, backend=backend, device=device, precision=precision, compiled=compiled, threads=threads
        )
        summary = run_dota(
            engine,
            images,
            output,
            classes=classes or (),
            progress=advance,
            cancelled=report.cancel_requested.is_set,
            **settings,
        )
    names = None if settings["patches"] else find_images(images)
    findings = []
    written: list[tuple[Path | None, Literal[1, 2]]] = [(output, summary["task"]), (settings["task2"], 2)]
    for path, task in written:
        if path is not None and path.suffix.lower() == ".zip":
            findings += check_submission(path, classes or engine.spec.classes, names, task=task)
    said = [str(finding) for finding in findings if finding.text != EMPTY_FILE]
    empty = summary["empty_classes"]
    if empty:
        number = len({*engine.spec.classes, *(classes or ())})
        said.append(f"{output}: the files of {len(empty)} of {number} classes are empty: {', '.join(empty)}")
    for line in said if report.verbosity(ctx) >= 0 else ():
        report.echo(ctx, f"rtmdet-geo: warning: {line}")
    summary["findings"] = [finding._asdict() for finding in findings]
    reused = f", {summary['reused']} of an earlier run" if summary["reused"] else ""
    text = (
        f"{summary['out']}: task {summary['task']} ({_SHAPES[summary['task']]}), {summary['detections']} detections in "
        f"{summary['images']} images{reused} ({summary['patches']} patches)"
    )
    if summary["task2"] is not None:
        text += f"; {summary['task2']}: task 2 ({_SHAPES[2]}), the boxes that enclose them"
    report.echo_summary(ctx, summary, text, as_json=as_json, progress_mode=progress_mode)


@click.command()
@click.argument("submission_file", metavar="ZIP", type=click.Path(path_type=Path))
@click.option("--images", type=click.Path(path_type=Path), help="Folder of the images: other names are faults.")
@task_option
@classes_options("dota_v1.0")
@options.json_option
@options.verbosity_options
@click.pass_context
def check_submission(
    ctx: click.Context,
    submission_file: Path,
    images: Path | None,
    task: str,
    class_list: str | None,
    class_names: tuple[str, ...],
    as_json: bool,
) -> None:
    """Check a ZIP before it is sent to DOTA's evaluation server. Exits with 3 if there are faults.

    \b
    Example:
      rtmdet-geo data check-submission task1.zip --images test/images

    Faults are missing, empty and foreign files, folders, lines that do not parse, and names of patches or of images
    that are not among --images.
    """
    from rtmdet_geo.class_names import DOTA_V1
    from rtmdet_geo.dota.files import find_images
    from rtmdet_geo.dota.submission import check_submission as check

    classes = chosen_classes(class_list, class_names) or DOTA_V1
    names = None if images is None else find_images(images)
    findings = check(submission_file, classes, names, task=1 if task == "1" else 2)
    if as_json:
        report.echo_json({"zip": submission_file, "findings": [finding._asdict() for finding in findings]})
    else:
        for finding in findings:
            click.echo(str(finding))
        if report.verbosity(ctx) >= 0:
            click.echo(
                f"{submission_file}: {len(findings)} faults" if findings else f"{submission_file}: no fault found"
            )
    if findings:
        ctx.exit(EXIT_VERDICT_NO)
