"""lm-evaluation-harness over compressed caches: against its own model `hf`, and against the masked forward pass."""

import json
import sys
from functools import partial

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from analysis.__main__ import main
from analysis.demo.presets import bundled_texts
from analysis.errors import ModelError, SettingsError
from analysis.evaluation.harness import CompressedLM
from analysis.plans.skip import Plan
from analysis.records import save
from l2kv import CompressionSpec, SpecError
from tests.support.oracle import masked_forward

TEXT = bundled_texts()["The Tomb of Keats (Oscar Wilde, 1877)"]
CONTEXTS = [TEXT[:n] for n in (90, 240, 241, 400)]  # of different lengths, two alike
CHOICES = (" the grave of a young poet", " and", " violets, daisies and long grass that grow over him")
UNTIL = {"until": ["\n\n"], "max_gen_toks": 6}
SPECS = {
    "share": {"keep_ratio": 0.3},
    "share, last protected": {"keep_ratio": 0.3, "policy": "high_norm", "protect_last": 8},
    "layers": {"keep_ratio": 1.0, "layer_ratios": {0: 0.2}},
    "budget": {"budget": 20},
    "attention": {"budget": 20, "policy": "accumulated"},
}
TASKS = {
    "made_choices": {"output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_target": "right"}
    | {"doc_to_choice": "choices", "metric_list": [{"metric": "acc"}]},
    "made_text": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{context}}"}
    | {"metric_list": [{"metric": "word_perplexity"}]},
    "made_answers": {"output_type": "generate_until", "doc_to_text": "{{context}}", "doc_to_target": "{{context}}"}
    | {"generation_kwargs": UNTIL, "metric_list": [{"metric": "exact_match"}]},
}


def requests(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in arguments]


def likelihoods(lm, pairs):
    return lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)


def texts(lm, contexts, **options):
    return lm.generate_until(requests("generate_until", *((c, UNTIL | options) for c in contexts)), disable_tqdm=True)


@pytest.fixture
def compressed(loaded):
    """spec and options -> the model `l2kv`"""
    return lambda **options: CompressedLM(loaded.model, tokenizer=loaded.tokenizer, **options)


@pytest.fixture
def hf(loaded):
    return HFLM(loaded.model, tokenizer=loaded.tokenizer, batch_size=4)


@pytest.fixture
def tasks(tmp_path):
    """Folder of three tasks on a few rows."""
    rows = [{"context": context, "choices": CHOICES, "right": 0} for context in CONTEXTS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    common = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
    for name, task in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name} | common | task))  # YAML, as all of JSON is
    return tmp_path


def evaluated(lm, tasks):
    """What the harness got for each row of each task."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(lm, tasks=[*TASKS], task_manager=manager, bootstrap_iters=0)["samples"]
    return {name: [row["resps"] for row in found[name]] for name in TASKS}


def flat(values):
    return [one for value in values for one in flat(value)] if isinstance(values, list | tuple) else [values]


def test_it_equals_hf_where_all_is_kept_and_differs_where_it_is_not(compressed, hf, tasks):
    stock, all_kept, few_kept = (
        evaluated(lm, tasks)
        for lm in (hf, compressed(keep_ratio=1.0, batch_size=3), compressed(keep_ratio=0.3, batch_size=3))
    )
    for name in TASKS:
        values, same, others = flat(stock[name]), flat(all_kept[name]), flat(few_kept[name])
        if name == "made_answers":
            assert same == values and others != values
        else:
            assert same == pytest.approx(values, abs=1e-4)
            assert max(abs(a - b) for a, b in zip(values, others, strict=True)) > 0.5


@pytest.mark.parametrize("chunk_size", [64, 3])
@pytest.mark.parametrize("spec", [SPECS[name] for name in SPECS if name != "attention"], ids=str)
def test_continuations_are_scored_over_what_is_left_of_their_contexts(compressed, loaded, spec, chunk_size):
    lm = compressed(**spec, chunk_size=chunk_size, batch_size=4)
    found = likelihoods(lm, [(context, choice) for context in CONTEXTS for choice in CHOICES])
    for context in reversed(CONTEXTS):
        for choice in reversed(CHOICES):
            ids = lm.tok_encode(context), lm.tok_encode(context + choice)
            prompt, after = len(ids[0]) - 1, len(ids[1]) - len(ids[0])
            chunks = [prompt, *(min(chunk_size, after - start) for start in range(0, after, chunk_size))]
            logits, _ = masked_forward(loaded.model, torch.tensor([ids[1][:-1]]), chunks, CompressionSpec(**spec))
            logprobs = logits[0, prompt:].double().log_softmax(dim=-1)
            wanted = ids[1][len(ids[0]) :]
            likelihood, greedy = found.pop()
            assert likelihood == pytest.approx(sum(float(logprobs[i, t]) for i, t in enumerate(wanted)), abs=1e-3)
            assert greedy == (logprobs.argmax(dim=-1).tolist() == wanted)


@pytest.mark.parametrize("spec", [SPECS["share"], SPECS["budget"]], ids=str)
def test_even_the_first_token_of_an_answer_comes_from_the_compressed_prompt(compressed, loaded, spec):
    lm = compressed(**spec, batch_size=4)
    for context, answer in zip(CONTEXTS, texts(lm, CONTEXTS), strict=True):
        ids = lm.tok_encode(context)
        prompt = len(ids) - 1
        for _ in range(UNTIL["max_gen_toks"]):
            chunks = [prompt] + [1] * (len(ids) - prompt)
            logits, _ = masked_forward(loaded.model, torch.tensor([ids]), chunks, CompressionSpec(**spec))
            ids.append(int(logits[0, -1].argmax()))
        assert answer == lm.tok_decode(ids[prompt + 1 :])


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_results_do_not_depend_on_the_batch_size(compressed, spec):
    pairs = [(context, choice) for context in CONTEXTS for choice in CHOICES]
    alone, together = (compressed(**spec, batch_size=size) for size in (1, 8))
    one_by_one, at_once = likelihoods(alone, pairs), likelihoods(together, pairs)
    assert [score for score, _ in at_once] == pytest.approx([score for score, _ in one_by_one], abs=1e-4)
    assert texts(together, CONTEXTS) == texts(alone, CONTEXTS)


def test_a_context_is_run_once_for_all_of_its_continuations(compressed, loaded):
    lm, sizes = compressed(keep_ratio=0.5), []
    watch = loaded.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append((args[0] if args else kwargs["input_ids"]).numel()), with_kwargs=True
    )
    likelihoods(lm, [(CONTEXTS[3], choice) for choice in (*CHOICES, " or", " but")])
    watch.remove()
    prompt = len(lm.tok_encode(CONTEXTS[3])) - 1
    assert sizes[0] == prompt and max(sizes[1:]) < prompt / 2
    assert sizes.count(1) == 1, "three continuations of one token are scored by one pass"


def test_beams_share_a_compressed_prompt(compressed, hf):
    beams = {"num_beams": 3, "do_sample": False}
    assert texts(compressed(keep_ratio=1.0), CONTEXTS, **beams) == texts(hf, CONTEXTS, **beams)
    assert texts(compressed(keep_ratio=0.3), CONTEXTS, **beams) != texts(hf, CONTEXTS, **beams)


def test_a_context_beyond_the_models_length_loses_its_beginning_as_with_hf(compressed, loaded):
    pair = (TEXT[:600], CHOICES[0])
    stock = HFLM(loaded.model, tokenizer=loaded.tokenizer, max_length=60)
    (score, _), (expected, _) = (
        likelihoods(lm, [pair])[0:1][0] for lm in (compressed(keep_ratio=1.0, max_length=60), stock)
    )
    assert score == pytest.approx(expected, abs=1e-4)


def test_a_plan_says_how_to_compress(compressed, tmp_path):
    file = save(Plan("books-5m", CompressionSpec(keep_ratio=0.3, skip_layers=(1,))), tmp_path / "plan.json")
    pairs = [(context, CHOICES[0]) for context in CONTEXTS]
    assert likelihoods(compressed(plan=file), pairs) == likelihoods(compressed(keep_ratio=0.3, skip_layers=1), pairs)
    with pytest.raises(SettingsError, match="leave out keep_ratio, policy"):
        compressed(plan=file, keep_ratio=0.5, policy="low_norm")


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"keep_ratio": "half"}, SettingsError, "keep_ratio must be a number from 0 to 1, got 'half'"),
        ({"keep_ratio": 2}, SpecError, "keep_ratio must be from 0 to 1"),
        ({"skip_layers": "0 99"}, SpecError, "skip_layers names layer 99"),
        ({"policy": "q_filters"}, SpecError, "needs filters"),
        ({"chunk_size": 0}, SettingsError, "chunk_size must be a whole number, 1 or more, got 0"),
        ({"batch_size": "auto:4"}, SettingsError, "batch_size must be a number"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_any_work(compressed, options, error, told):
    with pytest.raises(error, match=told):
        compressed(**options)


def test_a_model_without_keys_is_refused(folder):
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "mamba", "state_size": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError):
        CompressedLM(str(folder))


@pytest.fixture
def command(tasks, monkeypatch):
    """`lm-eval` on a task, with the tasks of its own left out: to list them takes 10 s."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    common = f"lm-eval --tasks made_choices --include_path {tasks} --model l2kv --model_args pretrained=books-5m"
    return lambda spec, *more: main([*f"{common} {spec}".split(), *more])


def test_the_command_runs_the_harness_with_the_model(command, tmp_path, capsys):
    assert command("keep_ratio=0.3 skip_layers=[0,1] dtype=float32", "--output_path", str(tmp_path / "out")) == 0
    assert "made_choices" in capsys.readouterr().out
    (saved,) = (tmp_path / "out").rglob("results*.json")
    spec = json.loads(saved.read_text())["config"]["l2kv_spec"]
    assert (spec["keep_ratio"], spec["skip_layers"]) == (0.3, [0, 1])


def test_the_command_tells_a_mistake_in_one_line(command, capsys):
    assert command("policy=low_morn") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: policy must be one of low_norm")


def test_the_command_names_the_extra_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["lm-eval", "--tasks", "arc_easy"]) == 2
    told = "lm_eval is not installed. Install what this command needs: pip install 'l2kv[eval]'"
    assert capsys.readouterr().err == f"error: {told}\n"
