"""Files of docs/ that are written from the program say what it says."""

import pytest

from tests.support.docs import FILES
from tests.support.paths import ROOT


@pytest.mark.parametrize("name", FILES)
def test_a_generated_file_is_up_to_date(name):
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == FILES[name](), "run make docs"
