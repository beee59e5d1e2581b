"""Pages of the documentation site that follow from the code: the README, and one for each verb.

MkDocs calls `on_files` (https://www.mkdocs.org/dev-guide/plugins/#on_files).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def verb_page(name: str) -> str:
    """The page of a verb: its help, as it prints it."""
    sys.path.insert(0, str(ROOT))
    from openpi_opt.verbs import VERBS

    verb = VERBS[name]
    command = [sys.executable, "-m", f"openpi_opt.{name}", "--help"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"COLUMNS": "100"},
    )
    example = f"python -m openpi_opt.{name} {verb.example}".strip()
    return (
        f"# {name}\n\n{verb.text.capitalize()}.\n\n```\n{example}\n```\n\n```\n{done.stdout}```\n"
    )


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    sys.path.insert(0, str(ROOT))
    from openpi_opt.verbs import VERBS

    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=readme))
    for name in VERBS:
        files.append(File.generated(config, f"verbs/{name}.md", content=verb_page(name)))
    return files
