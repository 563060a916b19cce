"""Everything that can go wrong, by name. The class decides what it means for the slide or the job; the name is
what completion markers, logs and the state machine carry; the message says what to do."""

from __future__ import annotations


class SlidewayError(Exception):
    """Base of all named errors. Messages never hold file paths or manifest metadata."""

    @property
    def name(self) -> str:
        return type(self).__name__


class SlideQuarantined(SlidewayError):
    """The slide needs a person; trying again will not help. State QUARANTINED."""


class MppMissing(SlideQuarantined):
    """Neither manifest, catalogue nor file says how large a pixel is."""


class MppImplausible(SlideQuarantined):
    """The µm per pixel cannot be those of a slide."""


class SlideUnopenable(SlideQuarantined):
    """No reader can open the slide."""


class SlideUnreadable(SlideQuarantined):
    """The slide opens, but its pixels cannot be read."""


class SlideFailed(SlidewayError):
    """The slide could not be worked on this time. State FAILED; tried again when the job is."""


class SlideFetchFailed(SlideFailed):
    """The slide's objects could not be fetched from Bronze."""


class OutputFailed(SlideFailed):
    """The slide's results could not be written to Silver."""


class DiskFull(SlideFailed):
    """The instance's volume is too small for the slide."""


class ModelError(SlideFailed):
    """The model raised, or answered with something that is not its contract."""


class InternalError(SlideFailed):
    """A fault of this container."""


class JobFailed(SlidewayError):
    """The job cannot go on at all."""


class ShardInvalid(JobFailed):
    """A shard, or the job's configuration around it, is not what the planner writes."""


class ModelPackageInvalid(JobFailed):
    """model.tar.gz is not a valid model package."""


class ModelDigestMismatch(JobFailed):
    """model.tar.gz is not the package that the run pinned."""


class ModelFormatNotSupported(JobFailed):
    """The package holds a kind of model, or asks for a mode, that this entry point does not run."""


class Stopped(SlidewayError):
    """The job was told to stop."""


def _all(base: type[SlidewayError]) -> dict[str, type[SlidewayError]]:
    found = {base.__name__: base}
    for sub in base.__subclasses__():
        found |= _all(sub)
    return found


def by_name(name: str, message: str) -> SlidewayError:
    """The named error, as it came from another process."""
    return _all(SlidewayError).get(name, InternalError)(message)
