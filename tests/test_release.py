"""What is released: every import is declared, both distributions are whole, and work where no clone is."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from datetime import date
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import balora_plugin

tomllib = pytest.importorskip("tomllib")  # of Python 3.11

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "balora_plugin"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DISTRIBUTIONS = {"yaml": "pyyaml", "sklearn": "scikit-learn", "swift": "ms-swift"}  # where an import has another name
BROUGHT = {"torch": {"triton"}}  # by a declared one
# the one part that may import an extra's packages as it is imported itself
PARTS = {
    "hosts/axolotl": "axolotl",
    "hosts/trl.py": "trl",
    "hosts/llamafactory": "llamafactory",
    "hosts/swift": "swift",
}


def declared(*extras):
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    return {canonicalize_name(Requirement(line).name) for line in lines}


def imported(source):
    """(names of other packages that are imported with a module, those that its functions import)."""
    tree = ast.parse(source)
    apart = set()
    for node in ast.walk(tree):
        lazy = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if lazy or typing:
            apart |= {id(inner) for child in node.body for inner in ast.walk(child)}
    found = (set(), set())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = {node.module}
        else:
            continue
        found[id(node) in apart].update(name.partition(".")[0] for name in names)
    own = {*sys.stdlib_module_names, "balora_plugin"}
    return tuple({canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in names - own} for names in found)


def test_every_import_is_declared():
    anywhere = declared(*PROJECT["optional-dependencies"]) | set().union(*BROUGHT.values())
    needed = set()
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        at_once, later = imported(path.read_text(encoding="utf-8"))
        assert later <= anywhere, (name, later - anywhere)
        if not name.startswith("evaluation/tasks/"):  # read by lm-eval alone
            extras = [extra for part, extra in PARTS.items() if name.startswith(part)]
            assert at_once <= declared(*extras), (name, at_once - declared(*extras))
        needed |= at_once | later
    idle = declared() - needed
    assert idle == set(), "declared, and nothing imports it"


def test_imports_are_told_apart():
    source = (
        "import yaml, os\nfrom torch.nn import functional\nfrom . import x\n"
        "if TYPE_CHECKING:\n    import peft\n"
        "def f():\n    from sklearn.metrics import f1_score\n"
    )
    assert imported(source) == ({"pyyaml", "torch"}, {"peft", "scikit-learn"})


def test_the_citation_is_of_this_version():
    """The keys that Citation File Format 1.2.0 requires, and the types of those that it knows."""
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "authors", "title"} <= set(found) and found["cff-version"] == "1.2.0"
    known = {"abstract", "date-released", "keywords", "license", "preferred-citation", "type", "version", "url"}
    assert set(found) <= known | {"cff-version", "message", "authors", "title"}
    assert found["type"] in ("software", "dataset") and found["license"] == PROJECT["license"]
    assert found["version"] == balora_plugin.__version__ and isinstance(found["date-released"], date)
    paper = found["preferred-citation"]
    assert {"type", "title", "authors"} <= set(paper) and isinstance(paper["year"], int)
    for author in (*found["authors"], *paper["authors"]):
        assert set(author) in ({"name"}, {"family-names", "given-names"})
    for each in paper["identifiers"]:
        assert each["type"] in ("doi", "other", "swh", "url") and each["value"].endswith("2408.04556")


def test_the_changelog_has_this_version_below_what_is_to_come():
    headings = re.findall(r"^## \[(.+?)\](?: - (.+))?$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert headings[0] == ("Unreleased", "") and headings[1][0] == balora_plugin.__version__
    released = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["date-released"]
    assert headings[1][1] == released.isoformat()


def test_the_workflow_runs_what_ci_runs():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert next(step["with"]["python-version"] for step in steps if "setup-python" in step.get("uses", "")) == "3.11"
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        assert set(re.findall(r"make ([\w-]+)", path.read_text(encoding="utf-8"))) <= set(targets)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, source distribution, the copy of the tree that they are built from)."""
    place = tmp_path_factory.mktemp("build")
    ignored = shutil.ignore_patterns(
        ".git", ".venv*", ".cache", "outputs", "__pycache__", "*.egg-info", "build", "dist"
    )
    shutil.copytree(ROOT, place / "tree", ignore=ignored)
    code = (
        "from setuptools import build_meta as build\n"
        f"build.build_wheel({str(place)!r})\nbuild.build_sdist({str(place)!r})"
    )
    subprocess.run([sys.executable, "-c", code], cwd=place / "tree", check=True, capture_output=True)
    (wheel,), (source,) = place.glob("*.whl"), place.glob("*.tar.gz")
    return wheel, source, place / "tree"


def test_the_wheel_holds_the_package_and_its_data(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    tree = built[2]
    inside = {path.relative_to(tree).as_posix() for path in (tree / "balora_plugin").rglob("*") if path.is_file()}
    assert inside - names == set()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"balora_plugin"}


def test_the_source_distribution_holds_what_is_in_the_repository(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
        there = {name for name in listed.stdout.splitlines() if (built[2] / name).is_file()}
        assert there - names == set()
    assert {"Makefile", "conftest.py", "tests/test_release.py", "requirements/dev.txt", "docs/method.md"} <= names


def environment(directory, distribution):
    """An environment in `directory` that has `distribution`, and of this one all but the package itself."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    python = directory / "bin" / "python"
    paths = sysconfig.get_paths(vars={"base": str(directory), "platbase": str(directory)})
    Path(paths["purelib"], "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    install = [
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--ignore-installed",
        str(distribution),
    ]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)
    return python


def call(python, *arguments, cwd):
    """What a program of that environment prints; nothing of the clone is on its path."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV_"))}
    clean |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, *map(str, arguments)], cwd=cwd, env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def examples(page, start):
    return [line.strip() for line in page.splitlines() if line.strip().startswith(start)]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["wheel", "source"])
def test_it_works_where_there_is_no_clone(kind, built, tmp_path):
    """README's lines of TRL, and the commands' own examples; the source distribution tests itself, too."""
    pytest.importorskip("trl")
    from models import character_tokenizer, tiny_llama

    python = environment(tmp_path / "environment", built[0 if kind == "wheel" else 1])
    away = tmp_path / "away"
    away.mkdir()
    place = call(python, "-c", "import balora_plugin; print(balora_plugin.__file__)", cwd=away)
    assert Path(place.strip()).is_relative_to(tmp_path / "environment")
    balora = python.with_name("balora")
    for command in ("export", "glue", "verify"):
        assert command in call(balora, "--help", cwd=away)
    assert call(balora, "--version", cwd=away).strip() == f"balora-plugin {balora_plugin.__version__}"

    model = away / "model"
    tiny_llama().save_pretrained(model)
    character_tokenizer().save_pretrained(model)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    code = re.sub(r'MODEL = "[^"]*"', f"MODEL = {str(model)!r}", "\n".join(blocks))
    (away / "readme.py").write_text(code, encoding="utf-8")
    call(python, "readme.py", cwd=away)
    assert "OK" in call(balora, "verify", "outputs/ba-lora", "--base", model, cwd=away)

    (line,) = examples(call(balora, "glue", "--help", cwd=away), "balora glue --recipe")
    call(balora, *line.split()[1:], *small_glue(away), cwd=away)
    assert "rte" in (away / "outputs" / "glue" / "results.md").read_text(encoding="utf-8")
    if kind == "source":
        with tarfile.open(built[1]) as archive:
            archive.extractall(away, filter="data")
        (tree,) = away.glob("balora_plugin-*")
        said = call(python, "-m", "pytest", "-q", "tests/test_schedules.py", "tests/test_habits.py", cwd=tree)
        assert " passed" in said


def small_glue(away):
    """A tiny encoder and a tiny RTE in `away`; what to write behind the example so that it takes them."""
    from classifiers import classifier
    from models import character_tokenizer

    classifier("bert").bert.save_pretrained(away / "bert")
    character_tokenizer().save_pretrained(away / "bert")
    (away / "glue" / "rte").mkdir(parents=True)
    rows = [{"sentence1": f"a {n}", "sentence2": f"b {n}", "label": n % 2} for n in range(8)]
    for split in ("train", "validation"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (away / "glue" / "rte" / f"{split}.jsonl").write_text(text)
    few = ["--seeds", "1", "--learning-rates", "1e-3", "--max-steps", "1", "--limit", "8"]
    return ["--model", away / "bert", "--data", away / "glue", *few]
