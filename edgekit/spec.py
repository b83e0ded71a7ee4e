"""From a TOML file to a frozen, checked model. Knows where shipped data lies; knows no particular file."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from edgekit.errors import InvalidSpec, UnknownName
from edgekit.shelf import unknown


def data_dir(kind: str) -> Path:
    """Folder of shipped data (`targets`, `recipes`): inside the wheel, or at the top of a source tree."""
    package = Path(str(files("edgekit")))
    packaged = package / "_data" / kind
    return packaged if packaged.is_dir() else package.parent / kind


class Strict(BaseModel):
    """A part of a spec: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Spec(Strict):
    """A whole TOML file. Subclasses say which folder it is looked up in (`kind`)."""

    kind: ClassVar[str]
    name: str = ""

    @classmethod
    def folder(cls) -> Path:
        return data_dir(f"{cls.kind}s")

    @classmethod
    def names(cls) -> list[str]:
        """Names of the shipped files, sorted."""
        return sorted(p.stem for p in cls.folder().glob("*.toml"))

    @classmethod
    def load(cls, ref: str | Path) -> Self:
        """By shipped name (`rpi5`) or by path (`./board.toml`). Raises UnknownName, InvalidSpec."""
        path = Path(ref)
        if path.suffix != ".toml":
            name = str(ref)
            path = cls.folder() / f"{name}.toml"
            if name not in cls.names():
                raise unknown(cls.kind, name, cls.names(), show=f"edgekit {cls.kind}s list")
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as e:
            raise UnknownName(f"cannot read {cls.kind} {path}: {e.strerror}", f"edgekit {cls.kind}s list") from None
        except UnicodeDecodeError:
            raise InvalidSpec(f"{path}: not UTF-8 text") from None
        return cls.parse(text, name=path.stem, where=str(path))

    @classmethod
    def parse(cls, text: str, *, name: str, where: str) -> Self:
        """Check `text` (TOML). `where` is what error messages call it. Raises InvalidSpec."""
        try:
            data: dict[str, Any] = tomllib.loads(text)
        except tomllib.TOMLDecodeError as e:
            raise InvalidSpec(f"{where}: {e}") from None
        try:
            return cls.model_validate({"name": name} | data)
        except ValidationError as e:
            lines = [f"{where}: {'.'.join(map(str, x['loc'])) or 'file'}: {x['msg']}" for x in e.errors()]
            raise InvalidSpec("\n".join(lines), f"compare with {cls.folder()}/*.toml") from None
