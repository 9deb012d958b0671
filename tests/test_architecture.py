"""The shape of the project: who may import whom, what must stay light, and a README that is true."""

import ast
import re
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

PACKAGES = ("l2kv", "analysis", "app")
FORBIDDEN = {
    "l2kv": {"analysis", "app", "streamlit", "plotly"},
    "analysis": {"app", "streamlit", "plotly"},
    "app/figures": {"streamlit", "torch", "transformers", "analysis", "l2kv"},
    "app/components/markup.py": {"streamlit", "torch", "transformers"},
}
OUTERMOST = ROOT / "analysis" / "cli" / "pages.py"  # writes pages: it joins the parts, and nothing imports it


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
        allowed = {"app"} if file == OUTERMOST else set()
        assert not (FORBIDDEN[place] - allowed) & set(imported(file)), file


def test_test_files_share_helpers_through_support_alone():
    for file in (ROOT / "tests").rglob("test_*.py"):
        shared = re.findall(r"^ *(?:from|import) (tests\b[\w.]*)", file.read_text(encoding="utf-8"), flags=re.M)
        assert all(module.startswith("tests.support.") for module in shared), (file, shared)


def test_what_the_first_paint_needs_does_not_wait_for_torch():
    code = (
        "import sys, app.session, app.engine, app.views.heads, app.views.generate, app.views.capture, app.views.skip; "
    )
    code += "import app.views.texts, app.views.plan; "
    code += "app.session._demo_run(); print('torch' in sys.modules, 'transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


def test_every_public_name_can_be_imported_and_is_documented():
    import analysis
    import l2kv

    for package in (analysis, l2kv):
        for name in package.__all__:
            assert getattr(getattr(package, name), "__doc__", None) or name == "POLICIES", name
    for policy in l2kv.POLICIES.values():
        assert policy.__doc__.splitlines()[0].endswith("."), policy


def test_dangerous_calls_are_nowhere():
    # HTML only in markup, and only through st.html, which sanitises scripts
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            source = file.read_text(encoding="utf-8")
            for word in ("trust_remote_code=True", r"torch\.load\(", "import pickle", "unsafe_allow", r"(?<!\.)eval\("):
                assert not re.search(word, source), (file, word)


def test_the_readme_quick_start_runs_as_printed():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.S)
    assert blocks
    for block in blocks:
        subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True, check=True)


def test_requirements_are_pinned_and_say_why():
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text().splitlines():
            if line and not line.startswith(("#", "-r")):
                assert re.fullmatch(r"[\w-]+==[\w.]+ +# .+", line), line
