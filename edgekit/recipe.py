"""What to do with a checkpoint: stages in order, and how to export. Knows names; stages know their parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from edgekit import shelf
from edgekit.spec import Spec, Strict

STAGES = "edgekit.stages"
Name = Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$", max_length=80)]


class Stage(Strict):
    """One step from checkpoint to checkpoint: `name` is a module of edgekit.stages, the other keys are its own."""

    name: Name = Field(min_length=1)
    params: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, data: Any) -> Any:
        if not isinstance(data, dict) or set(data) <= {"name", "params"}:
            return data
        if "params" in data:
            raise ValueError("write the stage's keys beside its name, or under params, not both")
        return {"name": data.get("name", ""), "params": {k: v for k, v in data.items() if k != "name"}}


class Export(Strict):
    """What is written. `quant` is a preset, or `auto`: the first of `candidates` that fits the target.

    `calibration`: `none`, `self` (text the model writes), `auto` (`self` where that takes this machine less than about
    ten minutes and can make a difference), or a file of text or of an importance matrix.
    """

    format: Literal["gguf", "onnx", "auto"] = "gguf"
    quant: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$", max_length=20)] = "auto"
    candidates: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$", max_length=20)], ...] = ()
    prefer: Literal["quality", "speed", "size"] = "quality"
    ctx_size: Annotated[int, Field(gt=0)] | None = None
    kv: Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"] = "f16"
    calibration: str = "none"
    verify: Literal["none", "quick", "full"] = "quick"

    @field_validator("candidates")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("a preset is listed twice")
        return value

    @model_validator(mode="after")
    def _auto_has_a_choice(self) -> Self:
        if self.quant == "auto" and not self.candidates:
            raise ValueError('quant = "auto" needs candidates, best first')
        if self.quant != "auto" and self.candidates:
            raise ValueError(f'candidates are for quant = "auto", and quant is {self.quant!r}')
        return self


class Recipe(Spec):
    """A TOML of `[[stage]]` tables, in order, and one `[export]` section."""

    kind: ClassVar[str] = "recipe"
    name: Name = ""
    title: str
    stage: tuple[Stage, ...] = ()
    export: Export

    @classmethod
    def load(cls, ref: str | Path) -> Self:
        """By shipped name or by path. Raises UnknownName (also for a stage that does not exist), InvalidSpec."""
        recipe = super().load(ref)
        recipe.check_stages()
        return recipe

    def check_stages(self) -> None:
        """Raises UnknownName for the first stage that no module of edgekit.stages is called after."""
        known = shelf.names(STAGES) if self.stage else []
        for stage in self.stage:
            if stage.name not in known:
                raise shelf.unknown("stage", stage.name, known)
