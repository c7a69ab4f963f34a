"""The documents tell the truth: README's commands parse or run, its Python runs, files that are named exist."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml

from rtmdet_geo.config import parse_recipe, recipe_names
from rtmdet_geo.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"]
SCENE = "tests/data/casablanca.tif"


def code_blocks(text: str, language: str) -> list[str]:
    """Return the contents of the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands_of(text: str, program: str) -> list[list[str]]:
    """Return the arguments of all lines in ``sh`` blocks that call ``program``, up to a comment or a redirection."""
    lines = "\n".join(code_blocks(text, "sh")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line.split(" > ")[0].split(" | ")[0], comments=True) for line in lines]
    return [line[1:] for line in words if line and line[0].removeprefix(".venv/bin/") == program]


def command_faults(group: click.Command, arguments: list[str]) -> list[str]:
    """Return what is wrong with a command line: unknown verb or option, missing argument, value outside a choice."""
    context = click.Context(group, info_name="rtmdet-geo", **group.context_settings)
    command, rest = group, arguments
    try:
        while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
            name, child, rest = command.resolve_command(context, rest)
            command, context = child, click.Context(child, info_name=name, parent=context)
        values, left, _ = command.make_parser(context).parse_args(list(rest))
    except click.UsageError as error:
        return [error.format_message()]
    faults = [f"unexpected argument {word!r}" for word in left]
    is_eager = any(parameter.is_eager and values.get(parameter.name) for parameter in command.get_params(context))
    for parameter in command.params:
        value = values.get(parameter.name)
        if parameter.required and not isinstance(value, str | tuple | list) and not is_eager:
            faults.append(f"missing {parameter.name}")
        if isinstance(parameter.type, click.Choice):
            given = value if isinstance(value, list | tuple) else [value]
            choices = list(parameter.type.choices)
            wrong = [word for word in given if isinstance(word, str) and word not in choices]
            faults += [f"{word!r} is not in {choices}" for word in wrong]
    return faults


def documented_commands() -> list[tuple[str, str]]:
    """Return (document, command line) for every ``rtmdet-geo`` line of the documents."""
    found = []
    for name in DOCUMENTS:
        for arguments in commands_of((ROOT / name).read_text(encoding="utf-8"), "rtmdet-geo"):
            found.append((name, shlex.join(arguments)))
    return found


@pytest.fixture
def workplace(tmp_path) -> Path:
    """An empty folder with the committed test data under their documented path."""
    (tmp_path / "tests").mkdir()
    shutil.copytree(ROOT / "tests" / "data", tmp_path / "tests" / "data")
    return tmp_path


@pytest.mark.parametrize(("document", "line"), documented_commands())
def test_documented_command_parses(document, line):
    from rtmdet_geo.cli import cli

    assert command_faults(cli, shlex.split(line)) == [], f"{document}: rtmdet-geo {line}"


def all_commands(command: click.Command, context: click.Context) -> list[tuple[str, str]]:
    """Return (path, help text) of a command and everything below it."""
    found = [(context.command_path, command.get_help(context))]
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            found += all_commands(child, click.Context(child, info_name=name, parent=context))
    return found


def test_help_texts_are_clean():
    """A raw docstring would show click's mark for kept lines to the user and join the example's lines."""
    from rtmdet_geo.cli import cli

    texts = dict(all_commands(cli, click.Context(cli, info_name="rtmdet-geo", **cli.context_settings)))
    assert len(texts) > 5
    assert [path for path, text in texts.items() if "\\b" in text or "\b" in text] == []
    assert [path for path, text in texts.items() if "Example" not in text] == []


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for _, line in documented_commands() if SCENE in line])
def test_readme_command_runs(line, workplace):
    """Commands on the committed scene are run as they stand."""
    program = Path(sys.executable).with_name("rtmdet-geo")
    done = subprocess.run(
        [str(program), *shlex.split(line)], cwd=workplace, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_readme_python_runs(workplace):
    """The Python blocks run in order, as one program, with warnings as errors."""
    blocks = code_blocks((ROOT / "README.md").read_text(encoding="utf-8"), "python")
    assert blocks
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=workplace,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr


def whole_recipe(part: dict) -> dict:
    """Return the values of a recipe of which a document shows a part, with the least that goes with it."""
    sampling = {"folders": "classification", "chips": "crops"}.get(
        part.get("data", {}).get("format", "chips"), "images"
    )
    model = {"name": "cspnext_tiny", "classes": ["town"]} if sampling == "classification" else {"classes": ["ship"]}
    return {"name": "documented", "model": model, "data": {"chips": "chips"}, "augment": {"sampling": sampling}} | part


def test_readme_recipes_are_recipes():
    """The YAML blocks, whole recipes or parts, have known keys and values that go together."""
    blocks = code_blocks((ROOT / "README.md").read_text(encoding="utf-8"), "yaml")
    parts = [part for block in blocks for part in yaml.safe_load_all(block)]
    assert len(parts) > 8
    formats = {parse_recipe(whole_recipe(part)).data.format for part in parts}
    assert formats == {"chips", "coco", "dota", "hrsc", "yolo_obb", "rbox", "folders"}


def test_readme_names_every_recipe():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in recipe_names() if f"| `{name}` |" not in text] == []


def test_readme_shows_the_two_commands():
    verbs = {arguments[0] for arguments in commands_of((ROOT / "README.md").read_text(encoding="utf-8"), "rtmdet-geo")}
    assert {"detect", "train"} <= verbs


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files(document):
    """Relative links and pictures exist."""
    text = (ROOT / document).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert missing == []


def named_files(text: str) -> list[str]:
    """Return what stands in backticks and looks like a file or folder of the project."""
    names = re.findall(r"`([\w./-]+)`", text)
    return [name for name in names if re.search(r"(\.(py|md|toml|txt|yaml|tif|geojson|onnx)|/)$", name)]


@pytest.mark.parametrize("document", ["ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_named_files_exist(document):
    """A name in backticks is found from the root or inside the package."""
    names = named_files((ROOT / document).read_text(encoding="utf-8"))
    assert names
    assert [name for name in names if not any((base / name).exists() for base in (ROOT, ROOT / "rtmdet_geo"))] == []


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_make_targets_exist(document):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    used = {next(w for w in words if "=" not in w) for words in commands_of((ROOT / document).read_text(), "make")}
    assert used
    assert used <= targets


def test_changelog_names_the_version():
    import rtmdet_geo

    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]" in text or f"## [{rtmdet_geo.__version__}]" in text


class TestTheChecksThemselves:
    """Each check is seen to fail once."""

    @pytest.fixture
    def group(self):
        group = click.Group("rtmdet-geo")
        parameters = [
            click.Argument(["scene"]),
            click.Option(["-o", "--output"], required=True),
            click.Option(["--backend"], type=click.Choice(["auto", "onnx"])),
            click.Option(["--json"], is_flag=True),
        ]
        group.add_command(click.Command("detect", params=parameters))
        return group

    @pytest.mark.parametrize(
        ("line", "part"),
        [
            ("detect scene.tif -o a.gpkg --jsn", "--jsn"),
            ("detct scene.tif -o a.gpkg", "detct"),
            ("detect -o a.gpkg", "missing scene"),
            ("detect scene.tif", "missing output"),
            ("detect scene.tif more.tif -o a.gpkg", "unexpected"),
            ("detect scene.tif -o a.gpkg --backend tpu", "'tpu'"),
        ],
    )
    def test_wrong_command(self, group, line, part):
        assert part in " ".join(command_faults(group, shlex.split(line)))

    def test_right_command(self, group):
        assert command_faults(group, shlex.split("detect scene.tif -o a.gpkg --backend onnx --json")) == []

    @pytest.mark.parametrize(
        "part", [{"data": {"format": "dota", "train_imges": "a"}}, {"data": {"format": "dota"}}, {"optim": {"lrr": 1}}]
    )
    def test_wrong_recipe(self, part):
        with pytest.raises(ConfigError):
            parse_recipe(whole_recipe(part))

    def test_commands_are_found(self):
        text = "```sh\n# rtmdet-geo no\nrtmdet-geo detect a \\\n  -o b  # why\npip install x\n```\nrtmdet-geo no\n"
        assert commands_of(text, "rtmdet-geo") == [["detect", "a", "-o", "b"]]

    def test_names_are_found(self):
        assert named_files("`raster.py` `x` `models/` `a b.py` `N = 0`") == ["raster.py", "models/"]
