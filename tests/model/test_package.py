"""The package: a wheel that installs and runs anywhere, dependencies that are declared, names that are typed."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from tests.support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDS = {"l2kv": (), "analysis": ("analysis",), "app": ("analysis", "app")}  # extras of each package
OTHERS = {"l2kv": ("gpu",), "analysis": ("eval", "ray")}  # extras that single modules need
WITH_OTHERS = (
    "l2kv.kernels.ragged",
    "l2kv.kernels.statistics",
    "analysis.evaluation.harness",
    "analysis.evaluation.cluster",
)  # and those modules
BLOCKS = {
    f"{page} {number}": block
    for page in ("README.md", "docs/library.md")
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), flags=re.S))
}
pytestmark = pytest.mark.xdist_group("package")  # one wheel for all


def python(*arguments, cwd=ROOT, **environment):
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    python(
        "-m", "pip", "wheel", str(ROOT), "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)
    )  # fmt: skip
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder that the wheel is installed into, on its own."""
    folder = tmp_path_factory.mktemp("installed")
    python("-m", "pip", "install", str(wheel), "--quiet", "--no-deps", "--no-index", "--target", str(folder))
    return folder


def test_the_wheel_holds_the_packages_with_their_data_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names} == {"l2kv", "analysis", "app", f"l2kv-{PROJECT['version']}.dist-info"}
    for needed in ("l2kv/py.typed", "l2kv/__init__.pyi", "analysis/py.typed", "analysis/__init__.pyi", "app/main.py"):
        assert needed in names
    for data in (
        *ROOT.glob("analysis/bundled/**/*"),
        ROOT / "app/.streamlit/config.toml",
        ROOT / "app/assets/icon.png",
    ):
        assert data.is_dir() or data.relative_to(ROOT).as_posix() in names, data
    assert wheel.stat().st_size < 50 * 2**20


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_what_the_docs_show_run_as_printed_far_from_the_checkout(installed, tmp_path, block):
    where = "\nimport analysis, l2kv\nprint(analysis.__file__, l2kv.__file__, sep='\\n')"
    printed = python("-c", block + where, cwd=tmp_path, PYTHONPATH=str(installed))
    assert printed.splitlines()[-2:] == [str(installed / name / "__init__.py") for name in ("analysis", "l2kv")]


def requirements(*extras):
    """Distributions that the package requires with some extras, and those that they require in turn."""
    todo, found = [*map(Requirement, declared(*extras))], {}
    while todo:
        requirement = todo.pop()
        known = found.setdefault(requirement.name, set())
        if requirement.name == "l2kv" or (known and requirement.extras <= known):
            continue
        known |= {"", *requirement.extras}
        for further in map(Requirement, metadata.requires(requirement.name) or ()):
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in known):
                todo.append(further)
    return found.keys() - {"l2kv"}


@pytest.mark.parametrize(("package", "extras"), NEEDS.items(), ids=NEEDS)
def test_each_package_runs_where_only_its_extras_are_installed(installed, tmp_path, package, extras):
    """In an environment of the wheel, and of links to what it requires and to no more, every module can be imported."""
    for name in requirements(*extras):
        for top in {file.parts[0] for file in metadata.files(name)} - {"..", "__pycache__"}:
            if not (tmp_path / top).exists():
                (tmp_path / top).symlink_to(metadata.distribution(name).locate_file(top))
    code = f"""
import {package}, importlib, pkgutil
for module in pkgutil.walk_packages({package}.__path__, "{package}."):
    if module.name not in ("app.main", "app.__main__", *{WITH_OTHERS}):  # two run the app
        importlib.import_module(module.name)
for name in getattr({package}, "__all__", ()):
    getattr({package}, name)
"""
    python("-S", "-c", code, cwd=tmp_path, PYTHONPATH=os.pathsep.join([str(installed), str(tmp_path)]))


def third_party(package):
    """Names of the modules of others that a package imports, anywhere in it."""
    for file in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            yield from (name.split(".")[0] for name in names)


def declared(*extras):
    return PROJECT["dependencies"] + [line for name in extras for line in PROJECT["optional-dependencies"][name]]


@pytest.mark.parametrize(("package", "extras"), NEEDS.items(), ids=NEEDS)
def test_what_a_package_imports_is_declared(package, extras):
    names = {Requirement(line).name.replace("-", "_") for line in declared(*extras, *OTHERS.get(package, ()))}
    assert set(third_party(package)) - set(sys.stdlib_module_names) - {*NEEDS, "__future__"} <= names


def test_the_pins_are_within_the_ranges():
    from packaging.requirements import Requirement

    ranges = [
        *PROJECT["dependencies"],
        *(line for lines in PROJECT["optional-dependencies"].values() for line in lines),
    ]
    allowed = {(r := Requirement(line)).name: r.specifier for line in ranges}
    of_app, of_tests = (
        dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / name).read_text(), flags=re.M))
        for name in ("requirements.txt", "requirements-dev.txt")
    )
    assert set(allowed) - set(of_app) - set(of_tests) == {"l2kv"} and set(of_app) <= set(allowed)
    for name, pinned in (of_app | of_tests).items():
        assert name not in allowed or allowed[name].contains(pinned), name


CALLS = """
from analysis import capture, load_model
from l2kv import POLICIES, CompressionSpec, l2_compress, register_policy

spec = CompressionSpec(keep_ratio=0.5, skip_layers=[0, 1], layer_ratios={2: 0.25})
layers: tuple[int, ...] = spec.skip_layers
title: str = POLICIES["low_norm"].title
CompressionSpec(keep_ration=0.5)  # Unexpected keyword argument "keep_ration"
CompressionSpec(keep_ratio="half")  # has incompatible type "str"
spec.keep_ration  # has no attribute "keep_ration"
l2_compress(None, keep_ratio=0.5)  # has incompatible type "None"
POLICIES["low_norm"].titel  # has no attribute "titel"
register_policy("toy", title="Toy")  # Missing positional argument "score"
capture(load_model("smollm2"), "text", lastqueries=4)  # Unexpected keyword argument "lastqueries"
import l2kv; l2kv.compresible  # has no attribute "compresible"
"""


def test_a_misspelt_name_is_an_error_to_the_type_checker(tmp_path):
    pytest.importorskip("mypy")
    file = tmp_path / "calls.py"
    file.write_text(CALLS, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-codes", str(file)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    of_line = {int(line): message for line, message in re.findall(r"calls\.py:(\d+): error: (.*)", said)}
    expected = {i: comment for i, line in enumerate(CALLS.splitlines(), 1) if (comment := line.partition("  # ")[2])}
    assert of_line.keys() == expected.keys(), said
    for line, message in expected.items():
        assert message in of_line[line]


def test_the_command_is_there(installed, tmp_path):
    (command,) = PROJECT["scripts"].items()
    code = f"""
from importlib.metadata import distribution
(point,) = distribution("l2kv").entry_points
assert (point.name, point.value) == {command}
raise SystemExit(point.load()(["--help"]))
"""
    assert "report" in python("-c", code, cwd=tmp_path, PYTHONPATH=str(installed))


def test_the_apps_settings_are_found_wherever_it_is_started(tmp_path):
    code = (
        "from streamlit import config\n"
        f"config._main_script_path = {str(ROOT / 'app' / 'main.py')!r}\n"
        "config.get_config_options(force_reparse=True)\n"
        "print(config.get_option('server.address'), config.get_option('browser.gatherUsageStats'))"
    )
    assert python("-c", code, cwd=tmp_path).split() == ["127.0.0.1", "False"]
