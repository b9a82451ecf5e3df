"""The design as assertions: who imports whom, what stands where, and that copying works."""
import ast
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
LEAVES = ["clip_model", "tokenizer", "data", "device"]
SCRIPTS = sorted(path.stem for path in ROOT.glob("train_*.py"))
PRODUCT = [ROOT / f"{name}.py" for name in LEAVES + SCRIPTS]
PROGRAMS = PRODUCT + sorted((ROOT / "assets").glob("*.py"))
PACKAGES = {"torch", "torchvision", "ftfy", "regex", "PIL", "numpy"}
OPTIONAL = {"torch_npu", "onnxruntime"}  # imported where they are used, and explained when absent


def tree(path):
    return ast.parse(path.read_text("utf-8"))


def imports(path):
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: p.name)
def test_scripts_import_leaves_and_leaves_import_no_project_file(path):
    project = {p.stem for p in ROOT.glob("*.py")}
    allowed = set() if path.stem in LEAVES else set(LEAVES)
    assert imports(path) & project <= allowed


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: p.name)
def test_only_the_six_packages_and_the_standard_library_are_needed(path):
    foreign = imports(path) - set(sys.stdlib_module_names) - PACKAGES
    assert not foreign - OPTIONAL - {p.stem for p in PROGRAMS}
    text = (ROOT / "requirements.txt").read_text()
    names = re.findall(r"^[A-Za-z_]+", text, re.M)
    assert names == ["torch", "torchvision", "ftfy", "regex", "pillow", "numpy"]


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: p.name)
def test_torchvision_and_optional_packages_are_imported_where_they_are_used(path):
    top = {alias.name.split(".")[0] for node in tree(path).body if isinstance(node, ast.Import)
           for alias in node.names}
    top |= {node.module.split(".")[0] for node in tree(path).body
            if isinstance(node, ast.ImportFrom)}
    assert not top & {"torchvision", "onnx", "lmdb", "tensorboard", *OPTIONAL}


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: p.name)
def test_nothing_works_at_import(path):
    """Constants may be computed; nothing is opened, printed or started."""
    for node in tree(path).body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            assert path.stem == "device"  # the environment and the allocator, before torch starts
            assert "setdefault" in ast.dump(node) or "_keep_freed_memory" in ast.dump(node)
        else:
            assert isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign,
                                     ast.FunctionDef, ast.ClassDef, ast.Expr, ast.If)), node.lineno
            if isinstance(node, ast.If):
                assert "__main__" in ast.dump(node.test)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_import_device_before_torch(name):
    """torch reads PYTORCH_ENABLE_MPS_FALLBACK when it is imported, and device sets it."""
    modules = [node.names[0].name if isinstance(node, ast.Import) else node.module
               for node in tree(ROOT / f"{name}.py").body
               if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert modules.index("device") < modules.index("torch")
    assert modules.index("device") < modules.index("clip_model")


def code_words(path):
    """(line, word) of every name, attribute and string that is neither docstring nor help."""
    skip = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            skip.add(node.body[0].value.lineno)
        if isinstance(node, ast.keyword) and node.arg in ("help", "epilog", "description"):
            skip |= {n.lineno for n in ast.walk(node.value) if hasattr(n, "lineno")}
    for node in ast.walk(tree(path)):
        word = (node.id if isinstance(node, ast.Name) else
                node.attr if isinstance(node, ast.Attribute) else
                node.arg if isinstance(node, ast.keyword) else
                node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "")
        if word and getattr(node, "lineno", 0) not in skip:
            yield getattr(node, "lineno", 0), word


@pytest.mark.parametrize("path", [p for p in PRODUCT if p.stem != "device"], ids=lambda p: p.name)
def test_no_file_but_device_decides_by_device_or_rank(path):
    banned = re.compile(r"\b(cuda|mps|npu|nccl|hccl|non_blocking|double|is_cuda)\b")
    found = [(line, word) for line, word in code_words(path) if banned.search(word)]
    assert not found
    for node in ast.walk(tree(path)):  # `rank == 0` and `if rank`
        if isinstance(node, (ast.Compare, ast.If, ast.IfExp)):
            test = node if isinstance(node, ast.Compare) else node.test
            names = {n.attr for n in ast.walk(test) if isinstance(n, ast.Attribute)}
            inside_batches = path.stem == "data"  # which takes rank as a plain number
            assert inside_batches or "rank" not in names, node.lineno


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_has_help_and_no_flag_is_a_bool_type(name):
    for node in ast.walk(tree(ROOT / f"{name}.py")):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            keywords = {k.arg: k.value for k in node.keywords}
            assert "help" in keywords, node.lineno
            assert getattr(keywords.get("type"), "id", "") != "bool", node.lineno


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: p.name)
def test_lines_and_functions_stay_readable(path):
    text = path.read_text("utf-8")
    assert max(map(len, text.splitlines())) <= 102
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name != "get_args":
            assert node.end_lineno - node.lineno < 90, node.name


def commands():
    """Every `python train_*.py ...` that the documentation shows, as (where, script, flags)."""
    texts = {path.name: path.read_text("utf-8") for path in
             [ROOT / "README.md", ROOT / "README.zh.md"] if path.exists()}
    texts |= {f"{name}.py": (ROOT / f"{name}.py").read_text("utf-8").split('"""')[1]
              for name in SCRIPTS}
    for where, text in texts.items():
        text = re.sub(r"\\\n\s*", " ", text)
        for script, flags in re.findall(r"(?:python|\d|\btorchrun[^\n]*?) (train_\w+)\.py([^\n`|]*)",
                                        text):
            yield where, script, re.split(r"\s{3,}|\s#", flags)[0].strip()


@pytest.mark.parametrize("where, script, flags", sorted(set(commands())))
def test_every_documented_command_parses(where, script, flags):
    sys.path.insert(0, str(ROOT))
    module = __import__(script)
    args = module.get_args([word for word in shlex.split(flags) if word != "..."])
    assert args.data or script == "train_staged"  # whose stages name theirs


def test_documents_name_no_machine_path():
    for path in [*PROGRAMS, *ROOT.glob("*.md"), *ROOT.glob("assets/*.md")]:
        assert not re.search(r"(?<![\w./-])/(work|tmp|root|home)/\w", path.read_text("utf-8")), path


def test_relative_links_of_the_documents_exist():
    for path in ROOT.glob("*.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", path.read_text("utf-8")):
            assert "://" in link or (ROOT / link).exists(), (path.name, link)


def test_what_is_bundled_is_small():
    assets = {p.name: p.stat().st_size for p in (ROOT / "assets").iterdir()}
    merges = assets.pop("bpe_simple_vocab_16e6.txt.gz")
    assert merges < 1.5e6 and sum(assets.values()) <= 10e6


def test_deliberate_copies_are_equal():
    """What the scripts repeat on purpose: same syntax tree, docstrings and comments may differ.
    train_distill.py contrasts other sides than these two."""
    seen = {}
    for name in SCRIPTS:
        copies = {"rate", "still_statistics"}
        if name in ("train_contrastive", "train_staged"):
            copies |= {"Sides", "Gradients", "info_nce", "pieces", "check_finite"}
        found = [node for node in tree(ROOT / f"{name}.py").body
                 if getattr(node, "name", "") in copies]
        for node in found:
            for part in ast.walk(node):
                if isinstance(part, (ast.FunctionDef, ast.ClassDef)):
                    part.body = part.body[ast.get_docstring(part) is not None:]
            assert seen.setdefault(node.name, ast.dump(node)) == ast.dump(node), node.name
        assert name == "train_clipfit" or {node.name for node in found} == copies


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_and_its_leaves_work_in_an_empty_folder(tmp_path, name):
    for file in [name, *LEAVES]:
        shutil.copy(ROOT / f"{file}.py", tmp_path)
    shutil.copytree(ROOT / "assets", tmp_path / "assets")
    done = subprocess.run([sys.executable, f"{name}.py", "--dry-run"], cwd=tmp_path, text=True,
                          capture_output=True, env={"PATH": "", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "runs" / name).rglob("results.json"))
