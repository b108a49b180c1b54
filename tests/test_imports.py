"""Imports run one way: an ordered list of packages, and no loop between two files. Imports inside functions count."""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import balora_plugin

ROOT = Path(__file__).parents[1]
# each may import what stands above it, and itself; docs/design/ says what each is for
LAYERS = (
    ("_version", "atomic", "distributed", "findings", "finite", "settings"),
    ("consistency",),
    ("config", "schedules", "regularizers"),
    ("weights",),
    ("fused",),
    ("compile",),
    ("checkpoint",),
    ("pretrained",),
    ("teacher",),
    ("anchors",),
    ("adapter",),
    ("objective",),
    ("memory",),
    ("export",),
    ("classification",),
    ("training",),
    ("hosts.transformers", "hosts.trl", "hosts.axolotl", "hosts.llamafactory", "hosts.swift"),
    ("doctor",),
    ("glue",),
    ("evaluation",),
    ("samples",),
    ("report",),
    ("compare",),
    ("commands",),
)
HOSTS = {"trl", "axolotl", "llamafactory", "swift"}
TREES = ("balora_plugin", "benchmarks", "studies", "integration")
# third-party packages a part may import, where fewer than the plug-in needs
ALONE = {
    "_version": set(),
    "findings": set(),
    "settings": set(),
    "consistency": {"torch"},
    "consistency.__init__": set(),
    "config": set(),
    "schedules": set(),
    "regularizers": {"torch"},
    "distributed": {"torch", "deepspeed"},
    "finite": {"torch"},
    "weights": set(),
    "fused": {"torch"},
    "compile": {"torch"},
    "checkpoint": {"huggingface_hub", "numpy"},
    "adapter.start.pissa": {"torch"},
    "commands.__init__": {"click"},
    "commands._options": {"click"},
    "commands._others": set(),
}
EXCEPT = {"compile.layers": {"transformers"}}  # whose layers it compiles


def modules(root=ROOT, trees=TREES):
    """{dotted name: source file} of every module; a package's own file is `package.__init__`."""
    return {
        ".".join(path.relative_to(root).with_suffix("").parts): path for t in trees for path in (root / t).rglob("*.py")
    }


def face(path):
    """{public name: module} of a package that gives its names lazily, by a dict `_LAZY`."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_LAZY":
            return ast.literal_eval(node.value)
    return {}


def imports(name, known, root="balora_plugin"):
    """The absolute names that module `name` imports: of modules in `known`, and of third-party packages.

    `from package import name` counts as the file that has it: a submodule, what the package's lazy face names, or the
    package's own file.
    """
    lazy = face(known[f"{root}.__init__"])
    package = name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(known[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name, None) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {(module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == root:
            found.add((root, node.attr))
    resolved = set()
    for module, attribute in found:
        if module == root and attribute in lazy:
            module, attribute = f"{root}{lazy[attribute]}", None
        for candidate in (f"{module}.{attribute}", f"{module}.{attribute}.__init__", module, f"{module}.__init__"):
            if candidate in known:
                resolved.add(candidate)
                break
        else:
            resolved.add(module)
    return resolved - {name}


def layer_of(name):
    """Index of the layer of a module of the package; None for its face, `balora_plugin/__init__.py`."""
    inner = name.removeprefix("balora_plugin.")
    for index, parts in enumerate(LAYERS):
        if any(inner == part or inner.startswith(part + ".") for part in parts):
            return index
    return None


def loops(graph):
    """The first loop of files found in {name: names it imports}, as a list of names; empty where there is none."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        path.append(name)
        for other in sorted(graph.get(name, ())):
            if found := visit(other):
                return found
        path.pop()
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name))), [])


def upward(graph):
    """Imports of the package that run against LAYERS, or from one host to another."""
    wrong = []
    for name, others in graph.items():
        here = layer_of(name)
        for other in others:
            there = layer_of(other)
            if here is None or there is None or not other.startswith("balora_plugin."):
                continue
            if there > here:
                wrong.append(f"{name} imports {other}")
            hosts = [module.split(".")[2] for module in (name, other) if module.startswith("balora_plugin.hosts.")]
            if len(set(hosts)) == 2:
                wrong.append(f"{name} imports another host, {other}")
    return sorted(wrong)


@pytest.fixture(scope="module")
def graph():
    known = modules()
    # the face imports nothing of the package before one of its names is used
    return {name: imports(name, known) & set(known) for name in known if name != "balora_plugin.__init__"}


def test_every_module_has_a_layer(graph):
    names = [name for name in graph if name.startswith("balora_plugin.") and name != "balora_plugin.hosts.__init__"]
    assert [name for name in names if layer_of(name) is None] == []
    files = list((ROOT / "balora_plugin").glob("*.py"))
    assert len(files) <= 10, "the package's root holds the method's settings and formulas alone"


def test_imports_run_one_way(graph):
    assert upward(graph) == []


def test_no_two_files_import_each_other(graph):
    assert loops(graph) == []


def test_what_is_said_to_import_little_does():
    known = modules(trees=("balora_plugin",))
    for name in known:
        inner = name.removeprefix("balora_plugin.")
        for part, allowed in ALONE.items():
            if inner == part or inner.startswith(part + "."):
                third = {other.split(".")[0] for other in imports(name, known)} - set(sys.stdlib_module_names)
                assert third <= allowed | EXCEPT.get(inner, set()) | {"balora_plugin"}, name


def test_the_core_names_no_host_framework():
    known = modules(trees=("balora_plugin",))
    for name in known:
        if not name.startswith("balora_plugin.hosts."):
            assert not {other.split(".")[0] for other in imports(name, known)} & HOSTS, name


def test_no_public_name_stands_twice():
    """One meaning a name; `run` is what every command has, `main` what starts a program."""
    places = defaultdict(list)
    for name, path in modules(trees=("balora_plugin",)).items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                places[node.name].append(name)
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert all(".commands." in where for where in twice.pop("run"))
    assert set(twice) <= {"main"}, twice


def test_no_file_of_the_package_is_long():
    for name, path in modules(trees=("balora_plugin",)).items():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, name


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("config.py", "from .fused import token_terms", "balora_plugin.config imports balora_plugin.fused"),
        (
            "fused/a.py",
            "def f():\n    from ..hosts import trl",
            "balora_plugin.fused.a imports balora_plugin.hosts.trl",
        ),
        ("doctor/a.py", "def f():\n    from .. import Verb", "balora_plugin.doctor.a imports balora_plugin.commands.a"),
        ("doctor/a.py", "import balora_plugin\nbalora_plugin.Verb", "doctor.a imports balora_plugin.commands.a"),
        ("hosts/axolotl/a.py", "from ..trl import x", "imports another host, balora_plugin.hosts.trl"),
    ],
)
def test_an_import_that_runs_upward_is_seen(file, line, said, tmp_path):
    package = tmp_path / "balora_plugin"
    for name in ("__init__.py", "commands/a.py", "hosts/trl.py", "fused/__init__.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("")
    (package / "__init__.py").write_text('_LAZY = {"Verb": ".commands.a"}')
    (package / file).parent.mkdir(parents=True, exist_ok=True)
    (package / file).write_text(line)
    known = modules(tmp_path, ("balora_plugin",))
    found = upward({name: imports(name, known) & set(known) for name in known if name != "balora_plugin.__init__"})
    assert any(said in each for each in found), found


def test_a_loop_is_seen():
    assert loops({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert loops({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_every_lazy_name_has_its_module():
    known = modules(trees=("balora_plugin",))
    for name, module in face(known["balora_plugin.__init__"]).items():
        assert f"balora_plugin{module}" in known or f"balora_plugin{module}.__init__" in known, name
    assert set(face(known["balora_plugin.__init__"])) | {"__version__"} >= set(balora_plugin.__all__)
