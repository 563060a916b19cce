"""Everything that can go wrong, by name. The class decides what it means for the slide or the job; the name is
what completion markers, logs and the state machine carry; the message says what to do."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


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


class PackTooSmall(SlideFailed):
    """A tile alone is larger than a pack may be."""


class TilesetMissing(SlideFailed):
    """The slide's tiles are not there, or not what the tiler writes."""


class PackFailed(SlideFailed):
    """A pack of the slide has no predictions, or predictions that are not those of its tiles."""


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


class ModelHangs(JobFailed):
    """The model has not answered for a batch within SLIDEWAY_MODEL_SECONDS; its thread cannot be ended, so the job
    is."""


class DecoderUnavailable(JobFailed):
    """Tiles are to be decoded on the device, and what does that is not installed: see SLIDEWAY_JPEG_DECODER."""


class TileUnreadable(SlidewayError):
    """A tile of a request is no image of the model's size, or is damaged."""


class TilesUnreadable(SlidewayError):
    """Some tiles of a batch turn out to be damaged when a device decodes them; `damaged` (n,) says which."""

    def __init__(self, damaged: npt.NDArray[np.bool_]) -> None:
        super().__init__(f"{int(damaged.sum())} of {len(damaged)} tiles cannot be decoded.")
        self.damaged = damaged


class RequestRefused(SlidewayError):
    """A request to `serve` that gets no answer of the model; `status` is HTTP's."""

    status = 400


class RequestInvalid(RequestRefused):
    """The request is not what `serve` takes."""


class PackInvalid(RequestRefused):
    """The pack is no tar file, or is damaged."""


class RequestTimeout(RequestRefused):
    """The request's body did not arrive in time."""

    status = 408


class PayloadTooLarge(RequestRefused):
    """The request, or its answer, is larger than the limit."""

    status = 413


class MediaTypeNotSupported(RequestRefused):
    """The request's Content-Type is none that `serve` takes."""

    status = 415


class ModelStuck(RequestRefused):
    """The model did not answer in time; the server starts anew."""

    status = 500


class Unavailable(RequestRefused):
    """The server is stopping, starting anew, or has no room for long; another try may succeed."""

    status = 503


class AnswerTimeout(RequestRefused):
    """The tiles could not be answered for in time."""

    status = 504


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
