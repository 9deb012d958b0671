"""The whole measurement on a small model: what it asks of evaluate, what it keeps, and how it goes on after a stop."""

import json

import pytest

from analysis.__main__ import main
from analysis.decision import evidence, speed
from analysis.decision.checklist import Answer, Limits, Status
from analysis.decision.evidence import Evidence, Measurement, Sizes
from analysis.decision.planning import best_plan
from analysis.decision.speed import Speed, measure_speed, read_bytes
from analysis.errors import OutOfMemoryError, SettingsError, TextError
from analysis.evaluation.results import FULL, Results
from analysis.plans.skip import Plan
from analysis.workspace import KINDS, Workspace
from l2kv import CompressionSpec
from tests.support.models import build

HALF = CompressionSpec(keep_ratio=0.5, protect_last=32)
FEW = ("by_head", "skip_first_two")
SMALL = Sizes(excerpts=2, samples=5, context=400)


@pytest.fixture(scope="module", autouse=True)
def one_larger_ratio():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "LADDER", (0.4, 0.8))
        yield


@pytest.fixture(scope="module")
def measured(loaded, tmp_path_factory):
    """The measurement, the workspace that it is kept in, and what was reported of it."""
    workspace, told = Workspace(tmp_path_factory.mktemp("workspace")), []
    found = Measurement(loaded, HALF, workspace, SMALL, strategies=FEW).run(progress=lambda *step: told.append(step))
    return found, workspace, told


def test_it_measures_three_tasks_with_larger_ratios_and_a_plan_beside_it(measured):
    found, _, _ = measured
    assert [one.task for one in found.results] == ["lm", "passkey", "needle"]
    for results in found.results:
        ratios = {spec.keep_ratio for spec in results.methods.values() if spec and spec != found.plans[0].spec}
        assert ratios == {0.5, 0.8} and FULL in results.methods
        assert found.plans[0].spec in results.methods.values()
    assert [len(one.samples) for one in found.results] == [2, 5, 5]
    assert {row.at["n_tokens"] for row in found.results[1].rows} == {400}


def test_the_plan_is_made_of_other_texts_than_it_is_measured_on_and_holds_the_same_share(measured):
    found, _, _ = measured
    (plan,), lm = found.plans, found.results[0]
    assert len(plan.planned_on) == 2 and not set(plan.planned_on) & set(lm.samples)
    assert lm.nbytes("plan") == pytest.approx(lm.nbytes("low norm 0.5"), rel=0.01)


def test_the_decision_counts_it_once_the_limits_allow_so_few_samples(measured):
    found, _, _ = measured
    assert found.decide(HALF).answer is Answer.NOT_YET
    few = found.decide(HALF, limits=Limits(least_excerpts=2, least_samples=5))
    assert few.checks[1].status is Status.NOT_APPLICABLE  # a model of 5 million weights copies no passkeys
    assert few.plan == found.plans[0].spec and few.answer is not Answer.NOT_YET


def test_progress_counts_seconds_of_one_estimate_through_all_stages(measured):
    _, _, told = measured
    done = [step[0] for step in told]
    assert done == sorted(done) and len({step[1] for step in told}) == 1
    assert [*dict.fromkeys(step[2] for step in told)] == [
        f"s of work ({stage})" for stage in ("plan", "lm", "passkey", "needle", "speed")
    ]


def test_all_of_it_is_in_the_workspace_and_a_second_run_measures_nothing(measured, loaded, monkeypatch):
    found, workspace, _ = measured
    kinds = sorted(entry.kind for entry in workspace.entries(model="books-5m"))
    assert kinds == ["plan", "results", "results", "results", "speed"]
    opened = Evidence.of(workspace.open(KINDS[entry.kind], entry.id) for entry in workspace.entries())
    assert set(opened.plans) == set(found.plans) and opened.speed_of(HALF) == found.speeds[0]
    monkeypatch.setattr(evidence, "measure_speed", None)
    monkeypatch.setattr(evidence, "best_plan", None)
    again = Measurement(loaded, HALF, workspace, SMALL, strategies=FEW)
    assert again.estimate.seconds == {}
    assert [one.rows for one in again.run().results] == [one.rows for one in found.results]


def test_results_are_listed_from_their_first_rows_on(loaded, tmp_path, monkeypatch):
    told, note = [], Workspace.note_results

    def noted(workspace, id, *, name):
        entry = note(workspace, id, name=name)
        told.append((name, bool(workspace.open(KINDS["results"], id).rows)))
        return entry

    monkeypatch.setattr(Workspace, "note_results", noted)
    plan = Plan("books-5m", CompressionSpec(protect_last=32), "by hand", ("another text",))
    Measurement(loaded, plan.spec, Workspace(tmp_path), SMALL, plan=plan).run()
    tasks = ("lm", "passkey", "needle")
    assert told == [(f"Verdict: {task}", True) for task in tasks for _ in ("the first rows", "all")]


def test_a_plan_in_force_is_measured_by_itself(loaded, tmp_path):
    head_ratios = {(layer, head): 0.4 + 0.2 * (head % 2) for layer in range(6) for head in range(4)}
    plan = Plan("books-5m", CompressionSpec(head_ratios=head_ratios, protect_last=32), "by hand", ("another text",))
    workspace = Workspace(tmp_path)
    found = Measurement(loaded, plan.spec, workspace, SMALL, plan=plan).run()
    assert all(set(one.methods.values()) == {None, plan.spec} for one in found.results)
    assert [one.spec for one in found.speeds] == [plan.spec] and found.plans == (plan,)
    decision = found.decide_plan(plan, limits=Limits(least_excerpts=2, least_samples=5))
    assert decision.answer is not Answer.NOT_YET and len(decision.checks) == 4
    assert found.decide_plan(plan).answer is Answer.NOT_YET


class StoppedError(Exception):
    """The user has cancelled."""


def test_cancelled_amid_prediction_it_goes_on_with_the_plan_that_it_had(loaded, measured, tmp_path):
    workspace, stages = Workspace(tmp_path), []

    def stop(done, total, what):
        stages.append(what)
        if stages.count("s of work (lm)") > 10:
            raise StoppedError

    with pytest.raises(StoppedError):
        Measurement(loaded, HALF, workspace, SMALL, strategies=FEW).run(progress=stop)
    assert [entry.kind for entry in workspace.entries()] == ["results", "plan"]
    left = Measurement(loaded, HALF, workspace, SMALL, strategies=FEW)
    assert list(left.estimate.seconds) == ["lm", "passkey", "needle", "speed"]
    scores = [[row.score for row in one.rows] for one in left.run().results]
    assert scores == [[row.score for row in one.rows] for one in measured[0].results]


def test_the_longest_prompts_are_taken_that_the_time_allows(loaded, tmp_path):
    def context(minutes):
        sizes = Sizes(excerpts=2, samples=5, minutes=minutes)
        return Measurement(loaded, HALF, Workspace(tmp_path), sizes).estimate.context

    assert context(1e-6) == 400
    assert context(1e6) == 900  # it can read 1024 tokens


def test_texts_of_the_user_are_measured_on(loaded, tmp_path):
    with pytest.raises(TextError, match=r"None of the texts|one excerpt"):
        _ = Measurement(loaded, HALF, Workspace(tmp_path), SMALL, {"short": "A few words."}).estimate
    with pytest.raises(SettingsError, match="must be 1 or more"):
        Sizes(excerpts=0)
    with pytest.raises(SettingsError, match="384 or more"):
        Sizes(context=200)


def test_both_caches_are_timed_and_the_bound_is_of_the_bytes_that_are_read(loaded):
    told = []
    found = measure_speed(loaded, HALF, n_tokens=64, batch=2, runs=2, steps=3, progress=lambda *at: told.append(at))
    bytes_of_a_pair = 2 * 4 * loaded.config.head_dim  # key and value, float32
    of_all = loaded.config.num_hidden_layers * loaded.config.num_key_value_heads * 2  # two rows
    assert found.full_nbytes == of_all * 63 * bytes_of_a_pair
    assert found.kept_nbytes == of_all * 32 * bytes_of_a_pair  # half of 63, rounded up; as many are protected
    assert found.bound == pytest.approx(
        (found.read_nbytes + found.full_nbytes) / (found.read_nbytes + found.kept_nbytes)
    )
    assert len(found.full_seconds) == len(found.kept_seconds) == 2 and found.batch == 2
    assert told[-1] == (4, 4, "runs") and len(told) == 4 * (3 + speed.WARM_UP) + 1


@pytest.mark.parametrize("policy", ["keydiff", "accumulated", "random"])
def test_policies_that_look_at_attention_are_timed_too(loaded, policy):
    spec = CompressionSpec(keep_ratio=0.5, policy=policy)
    assert measure_speed(loaded, spec, n_tokens=32, runs=1, steps=1).kept_nbytes > 0


def test_weights_that_a_step_reads_are_all_but_an_embedding_of_its_own(loaded):
    tied, untied = (build("llama", tie_word_embeddings=tie) for tie in (True, False))
    of_all = {id(p): p.numel() * 4 for p in untied.parameters()}
    embedding = untied.config.vocab_size * untied.config.hidden_size * 4
    as_loaded = type(loaded)(untied, loaded.tokenizer, "untied")
    assert read_bytes(as_loaded) == sum(of_all.values()) - embedding
    assert read_bytes(type(loaded)(tied, loaded.tokenizer, "tied")) == read_bytes(as_loaded)


def test_what_cannot_be_timed_is_refused(loaded, monkeypatch):
    with pytest.raises(SettingsError, match="n_tokens must be 2 or more"):
        measure_speed(loaded, HALF, n_tokens=1)
    monkeypatch.setattr(speed, "usable_bytes", lambda device: 1000)
    with pytest.raises(OutOfMemoryError, match="more than is free"):
        measure_speed(loaded, HALF, n_tokens=64)


def test_the_command_prints_the_checklist_and_its_status_is_0_whatever_it_says(measured, capsys, tmp_path):
    _, workspace, _ = measured
    few = ("--excerpts", "2", "--samples", "5", "--context", "400", "--least-excerpts", "2", "--least-samples", "5")
    few += ("--strategies", "by-head,skip-first-two")
    command = ["verdict", "-m", "books-5m", "--workspace", str(workspace.folder), *few]
    assert main(command) == 0
    told = capsys.readouterr()
    assert "not applicable" in told.out and "tokens/s" in told.out and "with prompts of 400 tokens" in told.err
    assert any(told.out.splitlines()[-1].startswith(f"{answer}. ") for answer in Answer)
    assert main([*command, "--json", "-o", str(tmp_path)]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "lm.jsonl",
        "needle.jsonl",
        "passkey.jsonl",
        "plan.json",
    ]
    said = json.loads(capsys.readouterr().out)
    assert said["verdict"] in {*Answer} and {row["of"] for row in said["rows"]} == {"as set", "plan"}
    assert main([*command, "--perplexity-ratio", "0.5"]) == 2
    assert "perplexity_ratio must be from 1 to 100" in capsys.readouterr().err


def test_a_workspace_of_another_models_weights_is_told_apart_by_their_digest(measured):
    found, _, _ = measured
    older = Results("books-5m", "0" * 16, "lm", {}, {FULL: None}, ())
    both = Evidence((*found.results, older), (Plan("books-5m", HALF),), (*found.speeds, _of("0" * 16, found.speeds[0])))
    assert both.of_one_model().results == found.results and both.of_one_model().speeds == found.speeds


def _of(weights, timed):
    return Speed(**{name: getattr(timed, name) for name in timed.__slots__} | {"weights": weights})


def test_a_plan_has_the_formats_and_the_protection_of_the_compression_that_it_stands_for(loaded, tmp_path):
    spec = CompressionSpec(keep_ratio=0.5, protect_last=32, protect_first=4, key_bits=8, value_bits=8)
    excerpts = Measurement(loaded, spec, Workspace(tmp_path), SMALL)._excerpts[0][:1]
    _, plan = best_plan(loaded, excerpts, 0.5, like=spec, tried=["skip_first_two"])
    assert (plan.key_bits, plan.value_bits, plan.protect_first, plan.protect_last) == (8, 8, 4, 32)
    assert plan.skip_layers == (0, 1) and plan.keep_ratio == pytest.approx(0.25)  # (6 * 0.5 - 2) / 4
    with pytest.raises(SettingsError, match="recent window alone takes more"):
        best_plan(loaded, excerpts, 0.01, like=spec, tried=["by_head"])
