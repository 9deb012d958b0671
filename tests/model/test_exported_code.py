"""The code that a plan is exported as, run in a process of its own."""

import os
import shutil
import subprocess
import sys

from analysis.plans.export import library_code
from l2kv import CompressionSpec
from tests.support.paths import BUNDLED, ROOT
from tests.support.texts import TEMPLATE

OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def test_the_code_of_this_library_runs_as_it_is_pasted(tmp_path):
    chatty = tmp_path / "chatty"
    shutil.copytree(BUNDLED, chatty)
    (chatty / "chat_template.jinja").write_text(TEMPLATE)
    answers = []
    for ref, policy in (("books-5m", "fastgen"), (str(BUNDLED), "low_norm"), (str(chatty), "low_norm")):
        code = library_code(CompressionSpec(keep_ratio=0.5, skip_layers=(0,), protect_last=4, policy=policy), ref)
        ran = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ | OFFLINE
        )
        assert ran.returncode == 0, ran.stderr
        answers.append(ran.stdout)
    assert len(answers[0]) > 20 and answers[1] != answers[2]
