"""The judge of the benchmarks: its prompts are files.

judge = Judge(Endpoint("gpt-x"), "scores.judge.sqlite")
... await ask("extract", {"question": ..., "response": ...}, ("extraction",))
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from srpo_jax.remote import judge

PROMPTS = Path(__file__).parent / "prompts"
_TEMPLATES = Environment(loader=FileSystemLoader(PROMPTS), undefined=StrictUndefined)


@dataclass(frozen=True)
class Judge(judge.Judge):
    """One model that judges, with its cache."""

    def prompt(self, name: str, values: dict[str, Any]) -> str:
        """The prompt file ``name``, without its ending, with these variables."""
        return _TEMPLATES.get_template(f"{name}.jinja").render(**values).strip()

    def summary(self) -> dict[str, Any]:
        """What a report says about the judge: model, calls, tokens, USD, prompts."""
        hashes = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(PROMPTS.glob("*.jinja"))
        }
        return super().summary() | {"prompts_sha256": hashes}
