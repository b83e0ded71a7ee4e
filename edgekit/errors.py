"""Everything that can go wrong and that a user can act on.

    EdgekitError                 exit 1   message says what, hint says the next command
    ├── UnknownName              a target, recipe, preset, format ... of that name does not exist
    ├── InvalidSpec              a target or recipe file has a wrong key or value
    ├── MissingExtra             an optional package is needed
    ├── CorruptCheckpoint        a file of the model is damaged, incomplete or unsafe
    ├── UnsupportedModel         the family, a tensor or a setting is not known: refused, never skipped
    ├── UnsupportedVocabulary    the tokenizer cannot be reproduced by the runtime
    ├── DownloadFailed           the hub could not be reached or refused
    ├── OutputExists             the artefact is there already and --force was not given
    ├── RuntimeFailed            the inference runtime refused a file or ran out of memory
    ├── DoesNotFit               exit 3   needs more than the device (or this machine) has
    └── VerificationFailed       exit 4   the artefact does not do what the source does

Anything else that escapes is a bug in edgekit.
"""

from __future__ import annotations


class EdgekitError(Exception):
    """Something the user can act on. `hint` names the next command or setting."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UnknownName(EdgekitError):
    """Raised when a name is looked up on a shelf that does not hold it."""


class InvalidSpec(EdgekitError):
    """Raised when a TOML file has an unknown key, a missing key or a value of the wrong kind."""


class MissingExtra(EdgekitError):
    """Raised when an optional dependency is needed and not installed."""


class CorruptCheckpoint(EdgekitError):
    """Raised when a model file is truncated, contradicts itself, or points outside its folder."""


class UnsupportedModel(EdgekitError):
    """Raised for a family, tensor, activation or rope type that no table describes."""


class UnsupportedVocabulary(EdgekitError):
    """Raised when no runtime tokenizer gives the same ids as the model's own."""


class DownloadFailed(EdgekitError):
    """Raised when the hub cannot be reached, the repository does not exist, or access is refused."""


class OutputExists(EdgekitError):
    """Raised when writing would replace something that this run did not make."""


class RuntimeFailed(EdgekitError):
    """Raised when the inference runtime refuses a file or a request."""


class DoesNotFit(EdgekitError):
    """Raised when memory or disk does not suffice. The message carries needs and has."""

    exit_code = 3


class VerificationFailed(EdgekitError):
    """Raised when tokens, prompts or numbers of the artefact differ from the source's."""

    exit_code = 4
