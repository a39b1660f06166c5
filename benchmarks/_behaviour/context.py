"""The folders of a run, and the models that its cases share."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

OPEN = 24
"""Models that are kept open."""


@dataclass(frozen=True)
class Context:
    """Folders of a run, and models that are open.

    fixtures: read by both versions. scratch: written by cases. checkout: the code that runs.
    """

    fixtures: Path
    scratch: Path
    checkout: Path
    models: dict[Any, Any] = field(default_factory=dict)

    def load(self, source: str | Path, **options: Any) -> Any:
        """A model, opened once for the cases that use it one after the other."""
        import sfumato
        from _behaviour.names import call

        key = (str(source), tuple(sorted((name, str(value)) for name, value in options.items())))
        if key not in self.models:
            while len(self.models) >= OPEN:
                del self.models[next(iter(self.models))]
            self.models[key] = call(sfumato.load, source, **options)
        return self.models[key]

    def picture(self, name: str) -> Image.Image:
        """A picture of the fixtures."""
        with Image.open(self.fixtures / "pictures" / f"{name}.png") as opened:
            opened.load()
            return opened
