"""``rtmdet-geo engines``: what runs models on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from rtmdet_geo.cli import options, report

if TYPE_CHECKING:
    from rtmdet_geo.backends.engines import EngineReport

_ENGINE_LINE = "{:<12} {:<24} {:<12} {}"


@click.command()
@click.option("--load", is_flag=True, help="Import the engines to see whether they work; torch takes seconds.")
@options.json_option
@options.verbosity_options
def engines(load: bool, as_json: bool) -> None:
    """List the inference engines of this machine, what `--backend auto` takes, and the machine itself.

    \b
    Example:
      rtmdet-geo engines --load

    For what is missing it says how to install it. Without --load, versions are read and nothing is imported. Copy the
    whole text into a report of a fault.
    """
    from dataclasses import asdict

    from rtmdet_geo.backends.engines import list_engines

    found = list_engines(load=load)
    if as_json:
        report.echo_json(asdict(found))
    else:
        click.echo(format_engines(found))


def format_engines(found: EngineReport) -> str:
    """Return what was found as lines."""
    lines = [_ENGINE_LINE.format("ENGINE", "VERSION", "RUNS", "DEVICES").rstrip()]
    for engine in found.engines:
        where = ", ".join(engine.devices) if engine.problem is None else engine.problem
        lines.append(_ENGINE_LINE.format(engine.name, engine.version or "-", engine.runs, where))
    lines += ["", "--backend auto takes"]
    for choice in found.choices:
        lines.append(f"  for {choice.files}: {choice.engine}; {choice.reason}")
        lines += [f"    but {choice.engine}: {choice.problem}"] if choice.problem else []
    facts = [(name.replace("_", " "), _in_words(value)) for name, value in found.machine.items()]
    width = max(len(name) for name, _ in facts)
    return "\n".join([*lines, "", *(f"{name:<{width}}  {value}" for name, value in facts)])


def _in_words(value: Any) -> str:
    """Return a fact of the machine as text."""
    if isinstance(value, tuple):
        return ", ".join(value) or "none seen"
    return "not installed" if value is None else str(value)
