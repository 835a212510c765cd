"""The commands that the pages show exist, with their options. The changelog tells of past ones and is left out."""

import re
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest

from echo_hf import cli
from echo_hf.checkpoint import parse_overrides

ROOT = Path(__file__).parents[1]
FOLDERS = (".", "docs", "recipes", "benchmarks", "model_cards")
PAGES = sorted(page for folder in FOLDERS for page in ROOT.glob(f"{folder}/*.md") if page.name != "CHANGELOG.md")
HANDLERS = ("transcribe", "evaluate", "plot", "diagnose", "demo")
BLOCKS = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


COMMANDS = ("transcribe", "train", "evaluate", "diagnose", "plot", "demo", "add-pitch")


def commands(page: Path) -> list[list[str]]:
    """What follows `echo-hf`, of each such line in the page's blocks of shell commands."""
    found = []
    for language, block in BLOCKS.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines() if language == "bash" else []:
            words = shlex.split(line, comments=True)
            starts = [i for i, word in enumerate(words) if word == "echo-hf" or word.endswith("echo_hf.cli")]
            for start in starts:
                command = words[start + 1 :]
                ends = [i for i, word in enumerate(command) if word in (">", "|", "&&", ";", "done")]
                command = command[: min(ends, default=len(command))]
                found.append([word for word in command if word != "..."])
    return found


@cache
def options(command: str) -> set[str]:
    """All that its help names."""
    with pytest.MonkeyPatch.context() as patch:
        written = []
        patch.setattr(sys, "stdout", type("Written", (), {"write": written.append, "flush": lambda: None}))
        try:
            cli.main([command, "--help_all" if command == "train" else "--help"])
        except SystemExit as end:
            assert end.code == 0, command
    return set(re.findall(r"--[a-z0-9_-]+", "".join(written)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_can_be_read(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)  # for the recipes
    for name in HANDLERS:
        monkeypatch.setattr(cli, f"_{name}", lambda options: 0)
    monkeypatch.setattr("echo_hf.cli_add_pitch.run_add_pitch", lambda options: 0)
    monkeypatch.setattr("echo_hf.training.train", lambda *_, **__: sys.exit(0))
    for command in commands(page):
        if "--config_overrides" in command:
            parse_overrides(command[command.index("--config_overrides") + 1])
        if command[0] == "train":
            # What a page leaves out as it stands above, and what takes several processes, or a GPU.
            for name, value in (("--train_data", "train.jsonl"), ("--output_dir", "out")):
                command += [] if name in command else [name, value]
            for name, num_words in (("--ddp_backend", 2), ("--fsdp_config", 2), ("--fsdp", 1)):
                if name in command:
                    at = command.index(name)
                    del command[at : at + num_words]
            command = [word for word in command if word != "--resume"] + ["--use_cpu"]
        try:
            code = cli.main(command)
        except SystemExit as end:
            code = end.code
        assert code == 0, f"{' '.join(command)}: {capsys.readouterr().err}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_options_in_the_text_are_there(page):
    text = BLOCKS.sub("", page.read_text(encoding="utf-8"))
    for command in re.findall(r"`echo-hf ([^`]+)`", text):
        name, *words = command.split()
        named = {word.split("=")[0] for word in words if word.startswith("--")}
        assert named <= options(name), f"echo-hf {command}: {sorted(named - options(name))}"
    # Those that stand alone are of some command, or of a program that starts one.
    known = set.union(*map(options, COMMANDS)) | {"--nproc_per_node", "--nnodes"}
    alone = {option for option in re.findall(r"`(--[a-z0-9_-]+)", text)}
    assert alone <= known, f"{sorted(alone - known)}"


def test_there_are_commands_to_read():
    pages = {page.relative_to(ROOT).as_posix() for page in PAGES if commands(page)}
    assert {"README.md", "docs/fine_tuning.md", "recipes/README.md", "model_cards/echo-tiny.md"} <= pages


def test_each_recipe_is_on_its_page():
    page = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    for path in ROOT.glob("recipes/*.*"):
        assert f"`{path.name}`" in page or path.name == "README.md", path.name
