"""A model folder with a compression in it, as transformers' own `generate` runs it: real files, loaded and run."""

import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

from analysis import SettingsError, export_generate, load_model
from app.cli import main
from l2kv import CompressedCache, CompressionSpec, SpecError, compressible, decode_one_token, load_policy, special_ids
from tests.support.models import TOKENIZER_VOCABULARY, build
from tests.support.paths import BUNDLED
from tests.support.policies import forget_files

PROMPT = "The old man looked at the sea, and the sea looked at the old man. Then he said to his wife: "
NEW = 10
MY = "def score(keys, values, positions):\n    return values.norm(dim=-1) - keys.norm(dim=-1)\n"


@pytest.fixture(scope="module", autouse=True)
def modules_of_transformers(tmp_path_factory):
    """transformers copies the code of folders to where its modules are: not to this user's."""
    before = list(sys.path)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patched.setenv("HF_HUB_OFFLINE", "1")
        yield
    sys.path[:] = before
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Folders of two models that use one tokenizer."""
    tiny = tmp_path_factory.mktemp("folders") / "tiny"
    build("llama", **TOKENIZER_VOCABULARY).save_pretrained(tiny)
    AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(tiny)
    return {"tiny": tiny, "books-5m": BUNDLED}


def decoded(folder, spec, prompt=PROMPT):
    """Greedy tokens after a prompt by this project's own decoding, with the cache after them."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    cache = CompressedCache(model.config, spec, special_ids=special_ids(tokenizer))
    token, new = tokenizer(prompt, return_tensors="pt").input_ids, []
    with compressible(model), torch.no_grad():
        for _ in range(NEW):
            token = decode_one_token(model, token, cache)
            new.append(int(token))
    return new, cache


@pytest.mark.parametrize("trusted", ["model", "call"])
@pytest.mark.parametrize("name", ["tiny", "books-5m"])
def test_stock_generate_holds_the_pairs_of_the_spec_and_says_what_our_own_decoding_says(
    folders, tmp_path, name, trusted
):
    spec = CompressionSpec(keep_ratio=0.5, skip_layers=(1,), protect_last=4, head_ratios={(2, 0): 0.75})
    folder = export_generate(folders[name], spec, tmp_path / "made")
    if trusted == "model":
        model, asked = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True), {}
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
        asked = {"custom_generate": str(folder), "trust_remote_code": True}
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, **asked)
    expected, _ = decoded(folders[name], spec)
    assert made.sequences[0, ids.shape[1] :].tolist() == expected
    seen = ids.shape[1] + NEW - 1
    half, most = math.ceil(seen / 2), math.ceil(seen * 3 / 4)
    held = made.past_key_values.held_by_head
    assert held[0] == (half,) * len(held[0]) and held[1] == (seen,) * len(held[1])
    assert held[2] == (most, *(half,) * (len(held[2]) - 1))
    cached = model.generate(ids, max_new_tokens=3, do_sample=False, past_key_values=made.past_key_values.__class__(
        model.config, CompressionSpec(budget=5)), return_dict_in_generate=True, **asked)  # fmt: skip
    assert set(cached.past_key_values.held) == {5}  # a cache of one's own is used


def test_without_trust_stock_generate_does_not_run_it_and_neither_does_our_loader(tmp_path):
    folder = export_generate("books-5m", CompressionSpec(), tmp_path / "made")
    (folder / "custom_generate" / "generate.py").write_text("raise AssertionError('was run')")
    loaded = load_model(folder, device="cpu")
    ids = loaded.tokenizer(PROMPT, return_tensors="pt").input_ids
    assert loaded.model.generate(ids, max_new_tokens=2).shape[1] == ids.shape[1] + 2
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        loaded.model.generate(ids, max_new_tokens=2, custom_generate=str(folder), trust_remote_code=False)


@pytest.mark.parametrize("policy", ["fastgen", "my.py:score"])
def test_token_ids_and_files_of_a_policy_come_with_the_folder(tmp_path, policy):
    with forget_files():
        name = policy
        if policy != "fastgen":
            (tmp_path / "my.py").write_text(MY)
            name = load_policy(str(tmp_path / policy))
        spec = CompressionSpec(keep_ratio=0.4, protect_last=2, policy=name)
        folder = export_generate("books-5m", spec, tmp_path / "made")
        expected, _ = decoded(BUNDLED, spec)
    with forget_files():  # loaded again, from the folder
        (tmp_path / "my.py").unlink(missing_ok=True)
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
        made = model.generate(ids, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
        assert made.sequences[0, ids.shape[1] :].tolist() == expected
        assert made.past_key_values.spec == spec


def test_beams_sampling_and_padded_batches_work_as_they_do_with_generate(tmp_path):
    spec = CompressionSpec(keep_ratio=0.5, protect_last=4)
    folder = export_generate("books-5m", spec, tmp_path / "made")
    stock, ours = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    inputs = tokenizer([PROMPT, PROMPT[20:]], return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    for how in ({"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_k": 5}):
        torch.manual_seed(0)
        with compressible(stock):
            cache = CompressedCache(stock.config, spec)
            expected = stock.generate(**inputs, max_new_tokens=6, past_key_values=cache, **how)
        torch.manual_seed(0)
        assert ours.generate(**inputs, max_new_tokens=6, **how).equal(expected)


def test_weights_are_copied_or_linked_and_nothing_else_of_the_folder(tmp_path):
    copied, linked = (
        export_generate("books-5m", CompressionSpec(), tmp_path / name, link=name == "linked")
        for name in ("copied", "linked")
    )
    assert {file.name for file in copied.iterdir()} == {file.name for file in linked.iterdir()}
    assert "demo.safetensors" not in {file.name for file in copied.iterdir()}  # of the bundled folder, no weights
    original = BUNDLED / "model.safetensors"
    assert (linked / original.name).resolve() == original.resolve() and not (copied / original.name).is_symlink()
    assert (copied / original.name).read_bytes() == original.read_bytes()
    assert (
        load_model(linked, device="cpu").model.num_parameters()
        == load_model(copied, device="cpu").model.num_parameters()
    )


def test_a_gguf_file_is_converted(gguf_file, tmp_path):
    folder = export_generate(gguf_file, CompressionSpec(keep_ratio=0.25), tmp_path / "made")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = torch.arange(5, 25)[None]
    made = model.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, eos_token_id=None)
    assert set(made.past_key_values.held) == {6}  # a quarter of 24
    with pytest.raises(SettingsError, match="they cannot be linked"):
        export_generate(gguf_file, CompressionSpec(), tmp_path / "linked", link=True)


def test_what_does_not_fit_writes_nothing(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(SettingsError, match="is there already, and not empty"):
        export_generate("books-5m", CompressionSpec(), tmp_path / "full")
    with pytest.raises(SpecError, match="the layers are 0 to 5"):
        export_generate("books-5m", CompressionSpec(skip_layers=(6,)), tmp_path / "made")
    with pytest.raises(SpecError, match="is not loaded"):
        export_generate("books-5m", CompressionSpec(policy="my.py:score@0123abcd"), tmp_path / "made")
    assert [file.name for file in tmp_path.rglob("*")] == ["full", "mine.txt"]


def test_the_command_writes_it_by_its_options(tmp_path, capsys):
    folder = tmp_path / "made"
    assert (
        main(["export-generate", str(folder), "-m", "books-5m", "--keep-ratio", "0.3", "--skip-layers", "0", "--link"])
        == 0
    )
    assert f"wrote {folder}" in capsys.readouterr().err and (folder / "model.safetensors").is_symlink()
    code = (folder / "custom_generate" / "generate.py").read_text()
    assert "keep_ratio=0.3," in code and "skip_layers=(0,)," in code and "protect_last=32," in code
    assert max(map(len, code.splitlines())) <= 120


def test_the_command_writes_a_press(tmp_path, capsys):
    (tmp_path / "my.py").write_text(MY)
    with forget_files():
        assert main(["export-press", f"{tmp_path}/my.py:score", "-o", str(tmp_path / "press.py")]) == 0
    code = (tmp_path / "press.py").read_text()
    compile(code, "press.py", "exec")
    assert code.startswith(MY) and "class MyScorePress(ScorerPress):" in code
