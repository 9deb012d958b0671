"""Texts and a chat template for several tests."""

import shutil
from pathlib import Path

from tests.support.paths import BUNDLED

TEXT = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, "
    "it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, and all was well. "
)
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
HOSTILE = '</script><script>alert(1)</script><img src="http://example.org/x.png" onerror=alert(1)>&lt;\u202e$x$'


def chatty(folder: Path) -> Path:
    """Make a folder of the bundled model with the chat template."""
    shutil.copytree(BUNDLED, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder
