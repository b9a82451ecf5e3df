"""README and docs say what is so: commands parse, files exist, flags exist, messages are quoted."""
import ast
import importlib
import json
import re
import shlex

import pytest
from helpers import attempt, ROOT, save_picture, SCRIPTS

README, CHINESE = ROOT / "README.md", ROOT / "README.zh.md"
DOCUMENTS = [README, CHINESE, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = sorted([*(ROOT / f"{name}.py" for name in SCRIPTS),
                   *(path for path in (ROOT / "tools").glob("*.py") if path.stem != "__init__")])
# What stands for a file or folder of the reader's where a program looks whether it is there.
READERS = {"plan.json": ROOT / "docs/recipes/chinese_clip.json", "../old": ROOT, "DIR": ROOT}


def text(path):
    """A document, or the docstring of a program."""
    content = path.read_text("utf-8")
    return content if path.suffix == ".md" else ast.get_docstring(ast.parse(content)) or ""


def commands(path):
    """The command lines in blocks and in `code`; there a program may also be named alone."""
    content = re.sub(r"\\\n\s*", "", text(path))
    for start in (r"^ *(?:OMP_NUM_THREADS=\d )?((?:python|torchrun) [^`]*?)(?:\s{3,}.*|\s#.*)?$",
                  r"`((?:python|torchrun) [^`]*)`"):
        for command in re.findall(start, content, re.M):
            if start.startswith("^") or not re.fullmatch(r"python (-m )?[\w./]+", command):
                yield re.sub(r" \[--.*?\]", "", command)  # what may be left out


def test_the_documents_have_their_commands():
    found = {path.name: list(commands(path)) for path in (*DOCUMENTS, *PROGRAMS)}
    assert len(found["README.md"]) > 30 and len(found["results.md"]) >= 5
    assert all(len(found[f"{name}.py"]) > 3 for name in SCRIPTS)


@pytest.mark.parametrize("path", [*DOCUMENTS, *PROGRAMS], ids=lambda path: path.name)
def test_every_command_parses_and_its_files_are_here(path):
    for command in commands(path):
        words = [str(READERS.get(word, word)) for word in shlex.split(command)]
        for word in words:  # other files are the reader's own
            assert not re.search(r"\.py$|/.*\.json$", word) or (ROOT / word).exists(), command
        name = next((word for word in words if re.match(r"train_\w+\.py$|tools\.\w+$", word)), "")
        if not name:
            assert "pytest" in words or "tests/seeded_faults.py" in words, command
            continue
        program = importlib.import_module(name.removesuffix(".py"))
        try:
            assert program.get_args(words[words.index(name) + 1:]), command
        except SystemExit as stop:
            assert stop.code == 0 and "--help" in words, command


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text(path)):
        name, _, anchor = link.partition("#")
        place = path.parent / name if name else path
        assert place.exists(), link
        headings = re.findall(r"^#+ (.*)$", text(place), re.M) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
                                        for heading in headings}, link


def sections(path):
    """[(level of the heading, its commands, its tables as [cells a row], its `code`)]"""
    found, in_block = [], False
    for line in text(path).splitlines():
        if line.startswith("```"):
            in_block = not in_block
        elif in_block:
            found[-1][1].append(re.sub(r"\s*#.*", "", line))
        elif line.startswith("#"):
            found.append((len(line) - len(line.lstrip("#")), [], [], set()))
        else:
            found[-1][2].extend([line.count("|")] * line.startswith("|"))
            found[-1][3].update(re.findall(r"`([^`]+)`", line))
    return found


def test_both_readmes_say_the_same():
    english, chinese = sections(README), sections(CHINESE)
    assert len(english) == len(chinese) > 10
    for one, other in zip(english, chinese):
        assert one == other
    assert len(text(README).splitlines()) <= 250


def test_the_example_of_use_runs(tmp_path, monkeypatch, capsys):
    save_picture(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"^```python\n(.*?)^```", text(README), re.M | re.S)
    exec(example.replace("ViT-B/16", "tiny"), {})  # the text is our own
    first, second = re.findall(r"\d\.\d+", capsys.readouterr().out)
    assert abs(float(first) + float(second) - 1) < 1e-3


def table_rows(content):
    """The rows of the tables in a text, without head and line, as lists of cells."""
    lines = [line.strip("| ") for line in content.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split(" | ")] for line in lines
            if not re.fullmatch(r"[-|: ]+", line)]


def test_the_flags_that_are_ours_exist():
    parts = re.split(r"^## (?=train_)", text(ROOT / "docs/flags.md"), flags=re.M)[1:]
    assert {part.partition(".py")[0] for part in parts} == set(SCRIPTS)
    for part in parts:
        script = part.partition(".py")[0]
        known = set(re.findall(r"^ +(?:-h, )?(--[a-z-]+)", attempt(script, "--help").ok().out, re.M))
        for _, ours, *_ in table_rows(part)[1:]:
            flags = set(re.findall(r"--[a-z-]+", re.sub(r"`python -m [^`]*`", "", ours)))
            assert flags <= known, (script, flags - known)
            assert flags or "python -m tools." in ours or ours in (
                "not needed", "always on", "not supported"), ours


def sentences():
    """The texts in the code, "\\0" for what is filled in."""
    for path in (*ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(getattr(part, "value", "") if isinstance(part, ast.Constant) else "\0"
                              for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_the_messages_quoted_are_what_the_code_says():
    ours = text(ROOT / "docs/troubleshooting.md").split("\n## ")[1]
    said, rows = list(sentences()), table_rows(ours)[1:]
    assert len(rows) > 10
    for quoted, _ in rows:
        for message in re.findall(r"`([^`]+)`", quoted):
            parts = [part.strip() for part in message.split("...")]
            assert any(all(part in one for part in parts) for one in said), message


@pytest.mark.parametrize("recipe", [path for path in sorted((ROOT / "docs/recipes").glob("*.json"))
                                    if "script" in path.read_text("utf-8")], ids=lambda path: path.stem)
def test_the_recipes_of_the_results_run(recipe, tmp_path):
    """On the demo and with the bundled model, since their data and weights are the reader's."""
    script = json.loads(recipe.read_text("utf-8"))["script"].removesuffix(".py")
    instead = {"contrastive": "--image-tower tiny --text-tower tiny",
               "clipfit": "--weights tiny --classes Forest River --shots 4 --seed 1",
               "distill": "--teacher tiny --reinforced="}[script.removeprefix("train_")].split()
    found = attempt(script, "--config", recipe, "--data", "demo", *instead, "--precision", "fp32",
                    "--dry-run", "--output-dir", tmp_path / "out")
    assert "dry run" in found.ok().out
