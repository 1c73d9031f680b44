"""The tree of errors, and the exit code that each one ends a command with.

    DiffharnessError                       70
    ├── BadInputError                       2   unreadable or contradictory input, bad usage
    │   ├── ArtifactFileError               2   the GGUF (verdict `artifact.file`)
    │   │   └── UnsupportedError            2   a GGUF that may be sound, but is beyond this tool: no verdict
    │   ├── CheckpointError                 2   the Hugging Face folder
    │   ├── FixtureError                    2   token ids, texts, scored positions
    │   ├── SettingsError                   2   YAML under configs/, overrides, engine settings
    │   └── OutputError                     2   a place that cannot be written to
    ├── EngineError                       125   the engine refused or died, outside of a run's legs
    └── InconclusiveError                 125   nothing could be compared

A message says what was expected, what was found and what to try. Standard library only.
"""

from __future__ import annotations


class DiffharnessError(Exception):
    """Base of every error raised on purpose.

    `message` says what was expected and what was found; `hint` what to try next.
    """

    exit_code = 70

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class BadInputError(DiffharnessError):
    """Unreadable or contradictory input, or bad usage."""

    exit_code = 2


class ArtifactFileError(BadInputError):
    """The artifact is not a readable GGUF; `offset` (bytes) or `tensor` says where."""

    def __init__(
        self, message: str, *, hint: str | None = None, offset: int | None = None, tensor: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.offset = offset
        self.tensor = tensor


class UnsupportedError(ArtifactFileError):
    """A GGUF that cannot be judged because it holds what this tool does not know, or cannot be opened at all.

    The file may be sound, so it is never the verdict `artifact.file`.
    """


class CheckpointError(BadInputError):
    """The checkpoint folder is unreadable, incomplete, or of another model."""


class FixtureError(BadInputError):
    """A fixture is malformed or does not fit the model."""


class SettingsError(BadInputError):
    """A configuration file, an engine setting or an override is malformed."""


class OutputError(BadInputError):
    """Something could not be written: no permission, no space."""


class EngineError(DiffharnessError):
    """The engine refused to load or run, or died.

    In a run this becomes a finding; where a command ends with it, nothing was judged.
    """

    exit_code = 125


class InconclusiveError(DiffharnessError):
    """Nothing could be compared, or too little to decide."""

    exit_code = 125
