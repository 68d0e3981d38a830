"""docs/configuration.md says what the classes say."""

import runpy
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "document_configuration.py"


def test_page_is_up_to_date():
    script = runpy.run_path(str(SCRIPT))
    assert script["PAGE"].read_text() == script["page"](), f"run python {SCRIPT.name}"
