"""Receive the video of a request, without ever giving it a name on the disk."""

import asyncio
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from flallm_ds.demo.refused import Refused
from flallm_ds.errors import file_problem

# A client that sends nothing for this time has failed, and would keep its place in line.
_SILENCE_S = 30.0
# Text fields of a form, and bytes of a field: more than a valid form has.
_MAX_FIELDS = 16
_MAX_FIELD_BYTES = 1000
_MB = 10**6


@dataclass(frozen=True)
class Upload:
    """A received video, and the text fields of its form.

    The file has no name: it is gone when it is closed, or when the process ends in any way.
    """

    file: IO[bytes]
    fields: dict[str, bytes] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """A path under which this process can open the file."""
        return Path(f"/proc/self/fd/{self.file.fileno()}")


async def receive(request: Request, max_mb: float) -> Upload:
    """Return the video of a request: its body, or the file of its multipart form.

    Raises Refused for a body that is larger than `max_mb`, as soon as this is known; for
    an empty one, for a wrong form, and if the disk is full.
    """
    declared = int(request.headers.get("content-length", 0))
    if declared > max_mb * _MB:
        raise _too_large(f"{declared / _MB:.1f} MB", max_mb)
    upload = Upload(tempfile.TemporaryFile())  # noqa: SIM115 - closed by the caller
    try:
        take = _taker(request, upload)
        num_bytes = 0
        clock = asyncio.get_running_loop()
        async with asyncio.timeout(_SILENCE_S) as limit:
            async for chunk in request.stream():
                limit.reschedule(clock.time() + _SILENCE_S)
                num_bytes += len(chunk)
                if num_bytes > max_mb * _MB:
                    raise _too_large("more", max_mb)
                take(chunk)
        upload.file.flush()
        if upload.file.tell() == 0:
            raise Refused("The request must contain a video, got an empty one.", 400)
        return upload
    except BaseException as error:
        with suppress(OSError):  # a full disk fails again
            upload.file.close()
        refused = _as_refused(error)
        if refused is None:
            raise
        raise refused from error


def _too_large(got: str, max_mb: float) -> Refused:
    return Refused(
        f"The video must be at most {max_mb:g} MB, got {got}. Cut it, or ask for a larger "
        "--max_mb.",
        413,
    )


def _as_refused(error: BaseException) -> Refused | None:
    """Return the refusal for an expected error of receiving, None for another error."""
    if isinstance(error, TimeoutError):
        return Refused(
            f"Cannot receive the video: nothing came for {_SILENCE_S:.0f} s. Send it again.",
            408,
        )
    if isinstance(error, OSError):
        return Refused(file_problem(error), 507)
    if isinstance(error, FormParserError):
        return Refused(f"Cannot read the form: {error}. Send multipart/form-data.", 400)
    return None


def _taker(request: Request, upload: Upload) -> Callable[[bytes], object]:
    """Return the function that takes the chunks of the body."""
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":
        return upload.file.write
    return _Form(options.get(b"boundary", b""), upload).parser.write


class _Form:
    """Writes the file of a form to an upload, and collects its text fields."""

    def __init__(self, boundary: bytes, upload: Upload) -> None:
        self._upload = upload
        self._header, self._value = b"", b""
        self._disposition = b""
        self._field: str | None = None
        if not boundary:
            raise Refused("Cannot read the form: it has no boundary.", 400)
        self.parser = MultipartParser(
            boundary,
            {
                "on_header_field": self._add_to_header,
                "on_header_value": self._add_to_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._begin_part,
                "on_part_data": self._add_data,
            },
        )

    def _add_to_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_to_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header, self._value = b"", b""

    def _begin_part(self) -> None:
        """Find whether a part is the file or a text field. The file's name is not used."""
        _, options = parse_options_header(self._disposition)
        self._disposition = b""
        if b"filename" in options:
            if self._upload.file.tell():
                raise Refused("The form must have one file, got several.", 400)
            self._field = None
            return
        self._field = options.get(b"name", b"").decode("utf-8", "replace")
        fields = self._upload.fields
        if self._field in fields or len(fields) == _MAX_FIELDS:
            raise Refused(
                f"Cannot read the form: field {self._field!r:.40} is one too many.", 400
            )
        fields[self._field] = b""

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._field is None:
            self._upload.file.write(data[start:end])
            return
        fields = self._upload.fields
        fields[self._field] += data[start:end]
        if len(fields[self._field]) > _MAX_FIELD_BYTES:
            raise Refused(
                f"A field must have at most {_MAX_FIELD_BYTES} bytes, got more.", 400
            )
