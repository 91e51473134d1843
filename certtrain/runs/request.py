"""What `train` was asked for, and whether the run directory agrees; answered without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from certtrain.config import Config, load_config
from certtrain.config.loading import Overrides, is_config, shipped_configs
from certtrain.errors import UsageError, shown
from certtrain.runs.directory import default_folder, extended, is_named, require_agreement, run_to_continue
from certtrain.runs.files import CONFIG, is_started
from certtrain.runs.lock import Claim, claimed


@dataclass(frozen=True)
class Stored:
    """A run that is continued.

    config: what it goes on with; shorter: what it was started with, where that was for fewer epochs.
    differences: of what is asked, which do not matter; a text for each.
    """

    config: Config
    shorter: Config | None
    differences: list[str]


@dataclass(frozen=True)
class Request:
    """What `train` was asked for.

    config: None where the run to be continued has it; whole: whether all of it must agree with a run that is continued,
    or only what the overrides name; own: the caller wrote it, rather than a run directory that may be another's.
    """

    folder: Path
    config: Config | None
    overrides: Overrides
    resume: bool
    overwrite: bool
    whole: bool
    own: bool

    @classmethod
    def of(
        cls,
        config: str | Path | Mapping[str, Any] | Config | None,
        out: str | Path | None,
        resume: bool,
        overwrite: bool,
        overrides: Overrides,
    ) -> Request:
        file = Path(config) if isinstance(config, str | Path) else None
        if resume and out is None and file is not None and file.name == CONFIG and is_started(file.parent):
            file = file.parent  # rather than a new run of its configuration
        run = file if file is not None and file.is_dir() and str(config) not in shipped_configs() else None
        if run is not None and not resume:
            raise UsageError(f"{run} is a folder: to continue the run in it say --resume, to train anew name a config")
        if run is not None and out is not None and run.resolve() != Path(out).resolve():
            raise UsageError(f"the run in {run} is continued where it is, not in {out}")
        if resume and file is not None and run is None and not is_config(file):
            raise UsageError(f"there is no run directory {shown(str(file), 200)} to resume, nor a config of that name")
        if config is None and not (resume and out):
            raise UsageError("name a config, or with --resume the run directory to continue")
        if run is not None or config is None:
            continued = run if run is not None or out is None else Path(out)
            assert continued is not None
            return cls(continued, None, overrides, resume, overwrite, whole=False, own=False)
        folder = Path(out) if out is not None else default_folder(config)
        own = not (file is not None and file.is_file() and is_started(file.parent))
        return cls(folder, load_config(config, overrides), overrides, resume, overwrite, whole=file is None, own=own)

    def stored(self) -> Stored | None:
        """The run that is continued, if any. Nothing is changed.

        Raises:
            UsageError, CheckpointError: the folder does not allow what is asked, or holds another run.
        """
        if self.config is None and not self.folder.is_dir():
            raise UsageError(f"there is no run in {self.folder} to continue")
        stored = run_to_continue(self.folder, self.resume, self.overwrite)
        if stored is None:
            if self.config is None:
                raise UsageError(f"there is no run in {self.folder} to continue")
            return None
        asked = load_config(stored, self.overrides) if self.config is None else self.config
        named = None if self.whole else self.overrides
        config = extended(stored, asked) if is_named("training.epochs", named) else stored
        different = require_agreement(self.folder, config, asked, named)
        return Stored(config, None if config is stored else stored, different)

    def enter(self, held: ExitStack, tell: Callable[[str], None]) -> tuple[Claim, Stored | None]:
        """Claim the folder until `held` ends; returns the run in it that is continued, if any, besides."""
        self.stored()
        claim = held.enter_context(claimed(self.folder))
        stored = self.stored()
        for difference in stored.differences if stored else ():
            tell(f"as the run was started: {difference}")
        return claim, stored

    def trusts(self, config: Config) -> bool:
        """Whether the caller's own configuration names the model."""
        return self.own and self.config is not None and self.config.model.name == config.model.name
