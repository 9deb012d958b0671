"""The commands that plan, measure and compare compressions, as a user types them."""

import json
from pathlib import Path

import pytest

from analysis import Plan
from analysis.__main__ import main
from analysis.demo import presets
from analysis.models.sizes import model_size
from analysis.plans.ablation import Ablation
from analysis.plans.front import Front
from analysis.records import from_json, load, to_json
from analysis.texts.excerpts import SPLIT
from l2kv import CompressionSpec
from l2kv.config import CacheShape
from tests.support.models import TINY, build
from tests.support.paths import BUNDLED
from tests.support.texts import chatty

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of prose."""
    file = tmp_path_factory.mktemp("texts") / "prose.txt"
    file.write_text("\n\n".join(presets.bundled_texts().values()))
    return str(file)


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """A saved run."""
    short, out = tmp_path_factory.mktemp("run") / "short.txt", tmp_path_factory.mktemp("run") / "run.safetensors"
    short.write_text(Path(text).read_text()[:300])
    assert main(small(["capture", str(short), "-o", str(out), "--device", "cpu"])) == 0
    return str(out)


def small(arguments) -> list[str]:
    """Arguments with the small bundled model, where the command takes one and none is given."""
    takes = arguments[0] in ("capture", "study", "plan", "ablation", "front", "generate")
    return [*arguments, *["-m", "books-5m"] * (takes and "-m" not in arguments)]


def told(capsys, *arguments) -> str:
    """What a command prints that goes well."""
    assert main(small(arguments)) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments) -> str:
    """The one line that a command ends with that does not."""
    capsys.readouterr()
    assert main(small(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_a_skip_list_of_a_run_or_several_is_written_as_a_plan(run, tmp_path, capsys):
    out = tmp_path / "plan.json"
    said = told(capsys, "skip", run, "--count", "2", "--keep-ratio", "0.3", "-o", str(out))
    spec = from_json(Plan, out.read_text()).spec
    assert "By a proxy, ALR. Skip 2 layers" in said
    assert len(spec.skip_layers) == 2 and spec.keep_ratio == 0.3 and spec.protect_last == 32
    assert f"books-5m: skip {spec.skip_layers[0]}, {spec.skip_layers[1]}\n" in said
    assert "no layer" in told(capsys, "skip", run, run, "--threshold", "2.1") and "2 texts" in told(
        capsys, "skip", run, run
    )
    assert "gap" in told(capsys, "skip", run, "--gap", "--policy", "high_norm")


def test_a_skip_list_of_a_study(text, tmp_path, capsys):
    out = tmp_path / "study.safetensors"
    told(capsys, "study", text, "-o", str(out), "--tokens", "20", "--excerpts", "2")
    assert "2 texts of" in told(capsys, "skip", str(out), "--count", "1")


def test_a_plan_is_printed_and_written_and_generation_takes_it(text, tmp_path, capsys):
    out = tmp_path / "plan.json"
    arguments = ["plan", text, "--excerpts", "2", "--prompt-tokens", "60", "--protect-last", "4", "--keep-ratio", "0.4"]
    said = told(capsys, *arguments, "-o", str(out))
    plan = from_json(Plan, out.read_text())
    assert plan.model == "books-5m" and plan.spec.policy == "signed_norm" and plan.spec.protect_last == 4
    shape = CacheShape(tuple(range(6)), 8, 4, 32, 4)
    saved = 1 - shape.nbytes(4096, plan.spec) / shape.nbytes(4096)
    assert f"{saved:.0%} saved" in said and "2 texts of" in said and saved == pytest.approx(0.6, abs=0.01)
    by_layer = json.loads(told(capsys, *arguments, "--strategy", "by-layer", "--json"))
    assert all(len(set(row["by_kv_head"])) == 1 for row in by_layer["rows"])
    assert by_layer["expected_loss"] < by_layer["uniform_loss"]
    told(capsys, *arguments, "--strategy", "by_head_by_cost", "--new-tokens", "2")
    short = tmp_path / "short.txt"
    short.write_text("The old man looked at the sea, and the sea looked at the old man, and neither said a word.")
    said = told(capsys, "generate", str(short), "--plan", str(out), "--new-tokens", "4")
    assert "full cache" in said and "of 4 tokens agree" in said and "nats/token" in said


def test_over_a_cache_that_keeps_all_the_texts_are_the_same(tmp_path, capsys):
    short = tmp_path / "short.txt"
    short.write_text("The old man looked at the sea, and the sea looked at the old man.")
    said = told(capsys, "generate", str(short), "--keep-ratio", "1", "--new-tokens", "5")
    assert "no difference; 5 of 5 tokens agree" in said
    full, compressed = said.split("\nno difference")[0].split("\ncompressed, ")
    assert full.removeprefix("full cache, ") == compressed and len(compressed) > 10


def test_a_question_is_asked_through_the_template_where_there_is_one(tmp_path, capsys):
    question = tmp_path / "question.txt"
    question.write_text("Which colour has the sea?")
    assert "no chat template" in refused(capsys, "generate", str(question), "--chat", "-m", "books-5m")
    folder = chatty(tmp_path / "chatty")
    said = told(capsys, "generate", str(question), "--chat", "-m", str(folder), "--new-tokens", "4")
    assert "full cache" in said and "nats/token" in said and "<s>" not in said
    assert said != told(capsys, "generate", str(question), "-m", str(folder), "--new-tokens", "4")


def test_an_ablation_and_a_front_are_written_as_files(text, tmp_path, capsys):
    ablation, front = tmp_path / "ablation.json", tmp_path / "front.json"
    lengths = ["--prompt-tokens", "40", "--new-tokens", "2", "--protect-last", "4"]
    said = told(capsys, "ablation", text, "--excerpts", "1", *lengths, "--skip-layers", "0,1,2", "-o", str(ablation))
    found = load(Ablation, ablation)
    assert found.layers == (3, 4, 5) and str(found) in said and found.spec.protect_last == 4
    assert f"  {found.alr[0].mean():.2f}" in said
    plan = tmp_path / "plan.json"
    worst = found.layers[int(found.nll_change.mean(axis=1).argmax())]
    assert "Measured by prediction" in told(capsys, "skip", str(ablation), "--count", "1", "-o", str(plan))
    spec = from_json(Plan, plan.read_text()).spec  # as it was measured, and with the layers that were left out then
    assert spec.skip_layers == (0, 1, 2, worst) and spec.protect_last == 4
    assert "Give one ablation" in refused(capsys, "skip", str(ablation), str(ablation))
    said = told(capsys, "front", text, "--excerpts", "2", *lengths, "--keep-ratios", "0.5", "-o", str(front))
    read = load(Front, front)
    assert read.answer() in said and not set(read.planned_on) & set(read.measured_on) and SPLIT in said
    assert (read.planned_on, read.measured_on) == (("prose 0", "prose 2"), ("prose 1", "prose 3"))  # halves of a file
    assert len(read.planned_on) == len(read.measured_on) == 2 and {p.keep_ratio for p in read.points} == {0.5}
    other = tmp_path / "other.txt"
    other.write_text(Path(text).read_text()[500:1500])
    told(
        capsys,
        "front",
        text,
        "--plan-texts",
        str(other),
        "--excerpts",
        "1",
        *lengths,
        "--keep-ratios",
        "0.5",
        "-o",
        str(front),
    )
    assert load(Front, front).planned_on == ("other 0",)


def test_savings_of_a_model_that_is_not_there(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA_8B))
    size = model_size(config)
    assert size.weights_bytes == 2 * 8_030_261_248 and size.counted  # Meta's own count of Llama-3-8B
    said = told(capsys, "savings", str(config), "--keep-ratio", "0.5", "--batch", "2")
    # 4096 tokens * 32 layers * 8 heads * 128 * 2 (key, value) * 2 bytes = 512 MiB a sequence
    assert "1.0 GiB" in said and "512 MiB" in said and "50%" in said
    left = 80 * 2**30 - size.weights_bytes
    assert f"  {left // 2**29}  " in said and f"  {left // 2**28}  " in said
    step = (size.weights_bytes + 2**30) / 3350e9
    assert f"  {1e3 * step:.3g}  " in said
    assert told(capsys, "savings", str(tmp_path), "--keep-ratio", "0.5", "--batch", "2").count("\n") == said.count("\n")


def test_the_sizes_of_weight_files_are_added_up(tmp_path):
    build("llama").save_pretrained(tmp_path)
    size = model_size(tmp_path)
    assert size.weights_bytes == (tmp_path / "model.safetensors").stat().st_size and not size.counted
    assert (size.shape.layers, size.shape.n_kv_heads, size.shape.itemsize) == (
        (0, 1, 2),
        TINY["num_key_value_heads"],
        4,
    )
    (tmp_path / "model.safetensors").unlink()
    assert model_size(tmp_path).counted
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {"total_size": 12345}}')
    assert model_size(tmp_path).weights_bytes == 12345
    assert model_size("books-5m").weights_bytes == (BUNDLED / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    "config,reason",
    [
        ({"num_hidden_layers": 10**9}, "out of range"),
        ({"auto_map": {"AutoConfig": "someone/else--x.Y"}}, "code from another repository"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "not decoder-only"),
        ({"model_type": "no such"}, "cannot be used"),
    ],
)
def test_a_config_that_would_not_be_loaded_is_not_counted(tmp_path, capsys, config, reason):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B | config))
    assert reason in refused(capsys, "savings", str(tmp_path))


@pytest.mark.parametrize(
    "arguments,reason",
    [
        (["skip", "TEXT"], "is not a single-layer ablation, a study or a run"),
        (["skip", "RUN", "--policy", "random"], "one of low_norm, high_norm, got"),
        (["skip", "RUN", "--count", "7"], "count must be from 0 to 6"),
        (
            ["plan", "TEXT", "--excerpts", "1", "--prompt-tokens", "40", "--strategy", "by_token"],
            "strategy must be one of",
        ),
        (["plan", "TEXT", "--excerpts", "1", "--prompt-tokens", "40", "--keep-ratio", "0.1"], "keep ratio must be 0.8"),
        (["plan", "nowhere.txt"], "cannot be read"),
        (
            ["ablation", "TEXT", "--policy", "window", "--prompt-tokens", "40", "-o", "OUT"],
            "window cannot be chosen here: it needs more than keys and values",
        ),
        (["front", "TEXT", "--excerpts", "1", "--prompt-tokens", "99999", "-o", "OUT"], "None of the texts has"),
        (["savings", "books-5m", "--skip-layers", "0, 6"], "layer 6, but the layers are 0 to 5"),
        (["savings", "books-5m", "--batch", "0"], "batch must be positive"),
        (["savings", "books-5m", "--gpu-gib", "inf"], "--gpu-gib must be positive and finite"),
        (["savings", "books-5m", "--bandwidth-gb", "nan"], "--bandwidth-gb must be positive and finite"),
        (
            ["front", "TEXT", "--excerpts", "1", "--prompt-tokens", "40", "--keep-ratios", "1.5", "-o", "OUT"],
            "keep_ratios must be",
        ),
        (["savings", "books-5m", "--plan", "PLAN"], "names layer 9"),
        (["generate", "TEXT", "--keep-ratio", "2"], "keep_ratio must be from 0 to 1"),
        (["generate", "TEXT", "--plan", "TEXT"], "not a plan"),
        (["generate", "SHORT", "--policy", "q_filters"], "q_filters cannot be chosen here"),
        (["generate", "SHORT", "--new-tokens", "0"], "--new-tokens must be 1"),
    ],
)
def test_a_mistake_is_one_line(text, run, tmp_path, capsys, arguments, reason):
    out, plan, short = tmp_path / "out.json", tmp_path / "plan.json", tmp_path / "short.txt"
    plan.write_text(to_json(Plan("other", CompressionSpec(skip_layers=(9,)))))
    short.write_text("The old man looked at the sea.")
    places = {"TEXT": text, "RUN": run, "OUT": str(out), "PLAN": str(plan), "SHORT": str(short)}
    assert reason in refused(capsys, *(places.get(argument, argument) for argument in arguments))
    assert not out.exists()
