"""The shape of the project: who may import whom, what must stay light, and a README that holds."""

import ast
import importlib
import re
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest

from tests.support.paths import ROOT

PACKAGES = ("l2kv", "analysis", "app")
FORBIDDEN = {
    "l2kv": {"analysis", "app", "streamlit", "plotly"},
    "analysis": {"app", "streamlit", "plotly"},
    "app/figures": {"streamlit", "torch", "transformers", "analysis", "l2kv"},
    "app/components/markup.py": {"streamlit", "torch", "transformers"},
}
DANGEROUS = ("trust_remote_code=True", r"torch\.load\(", "import pickle", "unsafe_allow", r"(?<![.\w])eval\(")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("place", FORBIDDEN)
def test_imports_run_one_way(place):
    path = ROOT / place
    for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
        assert not FORBIDDEN[place] & set(imported(file)), file


def modules_of(package):
    """Every module of a package by its dotted name -> its file."""
    files = (ROOT / package).rglob("*.py")
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def imported_anywhere(file):
    """Dotted names that a module imports: in functions and for the type checker, too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_goes_in_a_circle(package):
    modules = modules_of(package)
    graph = {name: (set(imported_anywhere(file)) & set(modules)) - {name} for name, file in modules.items()}
    assert sum(map(len, graph.values())) > len(modules) / 2
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("package", ["l2kv", "analysis"])
def test_no_module_bears_the_name_of_a_public_function(package):
    inside = {name.split(".")[1] for name in modules_of(package) if name.count(".") == 1}
    assert not inside & set(importlib.import_module(package).__all__)


def test_test_files_share_helpers_through_support_alone():
    for file in (ROOT / "tests").rglob("test_*.py"):
        shared = re.findall(r"^ *(?:from|import) (tests\b[\w.]*)", file.read_text(encoding="utf-8"), flags=re.M)
        assert all(module.startswith("tests.support.") for module in shared), (file, shared)
        assert file.parent.parent == ROOT / "tests", f"{file}: a test stands in a tier: tests/unit, model or browser"


def test_what_the_first_paint_needs_does_not_wait_for_torch():
    screens = ", ".join(f"app.screens.{file.stem}" for file in sorted((ROOT / "app" / "screens").glob("[a-z]*.py")))
    code = f"import sys, app.engine, {screens}; from app import library, state; "
    code += "library.answer_of(state.run_id(), 'next token'); library.lost_of(state.run_id(), state.spec()); "
    code += "print('torch' in sys.modules, 'transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


def test_every_public_name_can_be_imported_and_is_documented():
    import analysis
    import l2kv

    for package in (analysis, l2kv):
        for name in package.__all__:
            assert getattr(getattr(package, name), "__doc__", None) or name == "POLICIES", name
    for policy in l2kv.POLICIES.values():
        assert policy.title and policy.about.endswith("."), policy


def test_dangerous_calls_are_nowhere():
    # HTML only in markup, and only through st.html, which sanitises scripts
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            source = file.read_text(encoding="utf-8")
            for word in DANGEROUS:
                assert not re.search(word, source), (file, word)


def test_requirements_are_pinned_and_say_why():
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text().splitlines():
            if line and not line.startswith(("#", "-r")):
                assert re.fullmatch(r"[\w-]+==[\w.]+ +# .+", line), line
