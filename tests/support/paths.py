"""Where the tests find the project and the models that are not made by them."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "analysis" / "bundled" / "books-5m"
STORIES = ROOT.parent / "shared" / "models" / "stories260K"
