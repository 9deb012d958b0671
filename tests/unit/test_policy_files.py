"""Policies of files: what is loaded and under which name, what is refused in which words, and the press for kvpress."""

import json
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch

from analysis.plans.export import library_code, press_code
from analysis.plans.skip import Plan
from analysis.records import load, save
from app import state
from app.cli import main
from app.components import choices
from l2kv import POLICIES, CompressionSpec, SpecError, load_policy
from l2kv.layer import CompressedLayer
from tests.support.policies import forget_files

OLDEST = '''"""A policy of my own."""


def score(keys, values, positions):
    """Keep the oldest."""
    return -positions.float()
'''


@pytest.fixture(autouse=True)
def forgetful():
    """Policies that a test loads are forgotten."""
    with forget_files():
        yield


@pytest.fixture
def write(tmp_path):
    """(body of the function, more before it) -> "my.py:score" in a folder of the test's."""

    def written(body: str, before: str = "import torch", name: str = "my.py") -> str:
        (tmp_path / name).write_text(f"{before}\n\ndef score(keys, values, positions):\n    {body}\n", encoding="utf-8")
        return f"{tmp_path / name}:score"

    return written


def layer(spec, n=10):
    made = CompressedLayer(spec, 0)
    torch.manual_seed(0)
    made.update(torch.randn(1, 2, n, 4), torch.randn(1, 2, n, 4))
    return made


def refused(where, said):
    """The score is refused when it is first needed, in one line that begins with the file."""
    with pytest.raises(SpecError) as error:
        layer(CompressionSpec(policy=load_policy(where))).evict_now()
    assert str(error.value) == f"{where.removesuffix(':score')}{said}" and "\n" not in str(error.value)


def test_a_function_of_a_file_is_a_policy_that_evicts(tmp_path):
    (tmp_path / "my.py").write_text(OLDEST)
    name = load_policy(f"{tmp_path}/my.py:score")
    held = layer(CompressionSpec(budget=3, policy=name))
    held.evict_now()
    assert [head.tolist() for head in held.kept_positions()] == [[[0, 1, 2]]] * 2
    assert POLICIES[name].about == "Keep the oldest." and POLICIES[name].title == "my.py:score"


def test_it_is_given_keys_values_and_positions_of_all_pairs(write, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "told", SimpleNamespace(calls=calls))
    name = load_policy(write("calls.append((keys, values, positions)); return -positions", "from told import calls"))
    held = layer(CompressionSpec(budget=6, policy=name))
    keys, values = held.keys.clone(), held.values.clone()
    held.evict_now()
    ((got_keys, got_values, positions),) = calls
    assert got_keys.equal(keys) and got_values.equal(values)
    assert positions.tolist() == [[list(range(10))] * 2] and not positions.is_floating_point()


def test_the_name_changes_with_the_file_alone(write):
    first = load_policy(write("return -positions"))
    assert first.startswith("my.py:score@") and load_policy(write("return -positions")) == first
    second = load_policy(write("return positions"))
    assert second != first and CompressionSpec(policy=second) != CompressionSpec(policy=first)


def test_a_file_is_run_once(write, capsys):
    where = write("return -positions", "print('run')")
    assert load_policy(where) == load_policy(where) and capsys.readouterr().out == "run\n"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return keys.norm(dim=-1)[..., 1:]", "gave a shape of [1, 2, 9]"),
        ("return keys", "gave a shape of [1, 2, 10, 4]"),
        ("return keys.sum(dim=-1) > 0", "gave numbers of type bool"),
        ("return keys.sum(dim=-1) + 0j", "gave numbers of type complex64"),
        ("return keys.sum(dim=-1).tolist()", "gave a list"),
        ("return None", "gave a NoneType"),
        ("return torch.full(keys.shape[:3], torch.nan)", "gave NaN for 20 of 20 pairs"),
        ("return torch.where(positions == 3, torch.nan, 0.0)", "gave NaN for 2 of 20 pairs"),
        ("return keys.sum(dim=-1).to('meta')", "gave numbers on meta"),
    ],
)
def test_scores_that_cannot_be_ranked_are_refused_with_what_was_given_and_what_is_wanted(write, body, said):
    wanted = "wanted are real numbers that broadcast to [1, 2, 10], [rows, kv heads, pairs], on cpu, none of them NaN."
    refused(write(body), f": score {said}; {wanted}")


@pytest.mark.parametrize(
    "body", ["return positions[0, 0]", "return positions[:, :1]", "return keys.bfloat16().sum(dim=-1)"]
)
def test_scores_may_broadcast_and_have_any_real_type(write, body):
    layer(CompressionSpec(policy=load_policy(write(body)))).evict_now()


def test_an_infinite_score_is_one(write):
    held = layer(
        CompressionSpec(budget=2, policy=load_policy(write("return torch.where(positions == 7, torch.inf, 0.0)")))
    )
    held.evict_now()
    assert held.kept_positions()[0].tolist() == [[0, 7]]


def test_an_exception_in_it_is_told_with_its_own_line(write):
    refused(write("x = 1\n    return x / 0"), ", line 5, in score: ZeroDivisionError: division by zero")
    helper = "def helper(keys):\n    return keys[5]"
    said = ", line 2, in helper: IndexError: index 5 is out of bounds for dimension 0 with size 1"
    refused(write("return helper(keys)", helper, "other.py"), said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def score(keys)\n", ", line 1: expected ':'."),
        (
            "x = 1\nimport no_such_module\n",
            ", line 2, in <module>: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("def others(): ...\n", " has no function score; it has others."),
        ("score = 3\n", " has no function score; it has none."),
    ],
)
def test_a_file_that_is_not_fit_is_refused_when_it_is_named(tmp_path, text, said):
    (tmp_path / "my.py").write_text(text)
    with pytest.raises(SpecError) as error:
        load_policy(f"{tmp_path}/my.py:score")
    assert str(error.value) == f"{tmp_path}/my.py{said}"


@pytest.mark.parametrize("where", ["none.py:score", "score", "{}/my file.py:score", "{}/my.txt:score", "{}/my file.py"])
def test_what_is_no_function_of_a_file_is_refused(tmp_path, where):
    for name in ("my file.py", "my.txt"):
        (tmp_path / name).write_text(OLDEST)
    with pytest.raises(SpecError, match=r"A policy of your own is given as FILE.py:FUNCTION, .*got "):
        load_policy(where.format(tmp_path))


def test_a_policy_whose_file_is_not_loaded_can_be_named_but_does_not_score(tmp_path):
    plan = Plan("books-5m", CompressionSpec(policy="my.py:score@0123abcd"), "")
    assert load(Plan, save(plan, tmp_path / "plan.json")).spec == plan.spec
    assert "my.py:score@0123abcd" not in [*POLICIES, *choices.policies()]
    with pytest.raises(SpecError, match=r"@0123abcd is not loaded: give my.py:score as a policy, or call l2kv"):
        layer(plan.spec).evict_now()


@pytest.mark.parametrize("name", ["my.py:score", "my.py:score@", "my.py:score@0123ABCD", "../my.py:score@0123abcd"])
def test_no_other_name_is_taken_for_that_of_a_file(name):
    with pytest.raises(SpecError, match="policy must be one of low_norm"):
        CompressionSpec(policy=name)


@pytest.mark.parametrize("given", ["{}", "my.py:score", "my.py:score@0123abcd"])
def test_no_address_of_the_app_names_a_file(write, given, capsys):
    where = write("return -positions", "print('run')")
    with pytest.raises(ValueError, match="low_norm"):
        state.POLICY.param.read(given.format(where))
    assert not capsys.readouterr().out


def test_the_command_line_takes_it_alone_and_in_lists(write, capsys):
    where = write("return -positions")
    assert main(["savings", "books-5m", "--policy", where, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["spec"]["policy"] == load_policy(where)
    assert main(["savings", "books-5m", "--policy", f"{where}s"]) == 2
    assert main(["evaluate", "passkey", "-m", "books-5m", "--policies", f"low_norm,{where}s"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and all("has no function scores; it has score." in line for line in told)


def test_a_plan_takes_the_file_of_its_own_policy_beside_it_and_no_other_option(write, tmp_path, capsys):
    where = write("return -positions")
    save(Plan("books-5m", CompressionSpec(policy=load_policy(where)), ""), tmp_path / "plan.json")
    command = ["savings", "books-5m", "--plan", str(tmp_path / "plan.json"), "--policy"]
    assert main([*command, where]) == 0 and not capsys.readouterr().err
    for other in ("low_norm", write("return positions")):
        assert main([*command, other]) == 2
        assert "--plan says how to compress: leave out --policy." in capsys.readouterr().err


def test_the_exported_script_loads_it(write):
    code = library_code(CompressionSpec(policy=load_policy(write("return -positions"))), "books-5m")
    assert 'policy=load_policy("my.py:score"),' in code and "compressible, load_policy\n" in code
    compile(code, "exported", "exec")


@dataclass
class ScorerPress:
    """The public signature of kvpress's press of that name, and its rule: the pairs of highest score, rounded down."""

    compression_ratio: float = 0.0

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        raise NotImplementedError

    def kept(self, keys, values):
        n = keys.shape[2]
        scores = self.score(None, None, keys, values, None, {})
        return scores.topk(max(1, int(n * (1 - self.compression_ratio))), dim=-1).indices


def test_as_a_press_of_kvpress_it_keeps_the_same_pairs(write, monkeypatch):
    kvpress = ModuleType("kvpress")
    kvpress.ScorerPress = ScorerPress
    monkeypatch.setitem(sys.modules, "kvpress", kvpress)
    name = load_policy(write("return values.norm(dim=-1) - keys.norm(dim=-1) + 0.01 * positions"))
    exported = {}
    exec(press_code(name), exported)
    held = layer(CompressionSpec(keep_ratio=0.5, policy=name), n=24)
    kept = exported["MyScorePress"](compression_ratio=0.5).kept(held.keys.clone(), held.values.clone())
    held.evict_now()
    assert kept.sort(dim=-1).values.equal(torch.stack(held.kept_positions(), dim=1)) and kept.shape == (1, 2, 12)


def test_only_a_policy_of_a_file_is_exported_as_a_press(write):
    with pytest.raises(SpecError, match=r"low_norm is of no file: give my.py:score"):
        press_code("low_norm")
    with pytest.raises(SpecError, match="is not loaded"):
        press_code("my.py:score@0123abcd")
