"""The code that a plan is exported as, run in a process of its own."""

import os
import subprocess
import sys

from analysis.models.load import load_model
from analysis.plans.export import Generation, library_code
from analysis.preview import stream
from l2kv import CompressionSpec
from tests.support.paths import BUNDLED, ROOT
from tests.support.texts import chatty

OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def ran(code):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ | OFFLINE
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_code_of_a_story_writes_the_storys_text(tmp_path):
    folder = str(chatty(tmp_path / "chatty"))
    spec = CompressionSpec(keep_ratio=0.2)
    for ref, chat in (("books-5m", False), (folder, False), (folder, True)):
        loaded, prompt = load_model(ref), "\"Sea,\" he said, and 'sea' said she \N{SLIGHTLY SMILING FACE}:\n"
        *_, (told,) = stream(loaded, prompt, [spec], max_new_tokens=12, chat=chat)
        code = library_code(spec, ref, Generation(prompt, chat, len(told.token_ids), loaded.dtype))
        assert ran(code) == told.text + "\n"


def test_the_code_of_this_library_runs_as_it_is_pasted(tmp_path):
    folder = chatty(tmp_path / "chatty")
    answers = []
    for ref, policy in (("books-5m", "fastgen"), (str(BUNDLED), "low_norm"), (str(folder), "low_norm")):
        code = library_code(CompressionSpec(keep_ratio=0.5, skip_layers=(0,), protect_last=4, policy=policy), ref)
        answers.append(ran(code))
    assert len(answers[0]) > 20 and answers[1] != answers[2]
