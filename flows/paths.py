"""Where the artifacts of the stages lie, below the folder of params.yaml."""

from dataclasses import dataclass
from pathlib import Path

DATA = Path("data")
REPORT = DATA / "report"
SCRATCH = Path(".cache")  # outside of what DVC tracks
HISTORY = "history.jsonl"  # of learning: a line per epoch, written as it ends


@dataclass(frozen=True)
class Setting:
    """One combination of the pipeline's matrix.

    Attributes:
        model, pattern, method: None where a stage serves all of them.
    """

    model: str | None = None
    pattern: str | None = None
    method: str | None = None

    @property
    def title(self) -> str:
        """What a reader calls it."""
        return " ".join(filter(None, (self.model, self.pattern, self.method)))

    def path(self, stage: str) -> Path:
        """Return the folder of a stage's artifact."""
        return DATA.joinpath(stage, *filter(None, (self.model, self.pattern, self.method)))

    def scratch(self, stage: str) -> Path:
        """Return the folder of what an interrupted stage has done."""
        return SCRATCH / stage / ("_".join(filter(None, (self.model, self.pattern, self.method))) or "all")

    def metrics(self, stage: str) -> Path:
        """Return the file of what a stage measured."""
        path = self.path(f"metrics/{stage}")  # report has neither model, pattern nor method
        return path.with_name(f"{path.name}.json")
