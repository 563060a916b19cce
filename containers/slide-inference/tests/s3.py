"""An S3 of a few dozen lines, so that boto3 is used as it is: put, also with conditions, get with
ranges and versions, lists."""

from __future__ import annotations

import hashlib
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class S3:
    """`objects` maps (bucket, key) to bytes, `versions` (bucket, key, version) too. Keys in `failing` answer with
    the given status; `broken` counts down the GETs of ranges and outputs whose body breaks off half way. `written`
    has the order in which objects were put, which lists give as their times, and a list has `page` keys at most.
    `slow` names keys whose every GET waits for some seconds, `held` those whose GETs wait until it names others,
    `trickling` those whose bodies come byte by byte; `modified` has the times that GET tells (s)."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], bytes] = {}
        self.versions: dict[tuple[str, str, str], bytes] = {}
        self.failing: dict[str, int] = {}
        self.broken = 0
        self.page = 1000
        self.slow: tuple[str, float] | None = None
        self.held = ""
        self.trickling = ""
        self.written: dict[tuple[str, str], int] = {}
        self.modified: dict[tuple[str, str], float] = {}
        self.putting = threading.Lock()
        self.log: list[tuple[str, str]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(s3: S3) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Quiet."""

        def _address(self) -> tuple[str, str, str | None]:
            parts = urlsplit(self.path)
            bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
            return bucket, key, parse_qs(parts.query).get("versionId", [None])[0]

        def do_PUT(self) -> None:
            bucket, key, _ = self._address()
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if "aws-chunked" in self.headers.get("Content-Encoding", ""):
                body = _dechunk(body)
            s3.log.append(("PUT", key))
            if self._refused(key):
                return
            with s3.putting:
                current = s3.objects.get((bucket, key))
                met = self._met(current)
                if met:
                    s3.objects[bucket, key] = body
                    s3.written[bucket, key] = len(s3.log)
                    s3.modified[bucket, key] = time.time()
            if met:
                self._answer(200, b"", {"ETag": _etag(body)})
            elif current is None:
                self._error(404, "NoSuchKey")
            else:
                self._error(412, "PreconditionFailed")

        def _met(self, current: bytes | None) -> bool:
            if "If-None-Match" in self.headers:
                return current is None
            wanted = self.headers.get("If-Match")
            return wanted is None or (current is not None and wanted == _etag(current))

        def do_GET(self) -> None:
            bucket, key, version = self._address()
            if not key:
                self._list(bucket)
                return
            s3.log.append(("GET", key))
            if s3.slow and s3.slow[0] in key:
                time.sleep(s3.slow[1])
            while s3.held and s3.held in key:
                time.sleep(0.01)
            if self._refused(key):
                return
            body = s3.versions.get((bucket, key, version)) if version else s3.objects.get((bucket, key))
            if body is None:
                self._error(404, "NoSuchVersion" if version else "NoSuchKey")
                return
            first, last, status = 0, len(body) - 1, 200
            modified = formatdate(s3.modified.get((bucket, key), 0), usegmt=True)
            headers = {"ETag": _etag(body), "Last-Modified": modified}
            if self.headers.get("If-Match") not in (None, headers["ETag"]):
                self._error(412, "PreconditionFailed")
                return
            if asked := self.headers.get("Range"):
                first, last = (int(part) for part in asked.removeprefix("bytes=").split("-"))
                last = min(last, len(body) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
                status = 206
            data = body[first : last + 1]
            if s3.broken > 0 and (asked or key.endswith(".out")):
                s3.broken -= 1
                self._answer(status, data, headers, send=data[: len(data) // 2])
                self.close_connection = True
                return
            if s3.trickling and s3.trickling in key:
                self._answer(status, data, headers, send=b"")
                with suppress(OSError):
                    for byte in data:
                        self.wfile.write(bytes([byte]))
                        time.sleep(0.02)
                return
            self._answer(status, data, headers)

        def _list(self, bucket: str) -> None:
            asked = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
            prefix, after = asked.get("prefix", ""), asked.get("continuation-token", "")
            s3.log.append(("LIST", prefix))
            if self._refused(prefix):
                return
            keys = sorted(key for found, key in s3.objects if found == bucket and key.startswith(prefix))
            if "delimiter" in asked:
                keys = [key for key in keys if asked["delimiter"] not in key[len(prefix) :]]
            left = [key for key in keys if key > after]
            entries = [
                f"<Contents><Key>{key}</Key><Size>{len(s3.objects[bucket, key])}</Size>"
                f"<ETag>{_etag(s3.objects[bucket, key])}</ETag>"
                f"<LastModified>{self._time(bucket, key)}</LastModified></Contents>"
                for key in left[: s3.page]
            ]
            more = len(left) > s3.page
            token = f"<NextContinuationToken>{left[s3.page - 1]}</NextContinuationToken>" if more else ""
            truncated = f"<IsTruncated>{str(more).lower()}</IsTruncated>"
            body = f"<ListBucketResult>{truncated}{token}{''.join(entries)}</ListBucketResult>"
            self._answer(200, body.encode(), {"Content-Type": "application/xml"})

        def _time(self, bucket: str, key: str) -> str:
            return datetime.fromtimestamp(s3.written.get((bucket, key), 0), UTC).isoformat()

        def _refused(self, key: str) -> bool:
            status = next((status for part, status in s3.failing.items() if part in key), None)
            if status is not None:
                self._error(status, "AccessDenied" if status == 403 else "InternalError")
            return status is not None

        def _error(self, status: int, code: str) -> None:
            self._answer(status, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode(), {})

        def _answer(self, status: int, body: bytes, headers: dict[str, str], send: bytes | None = None) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body if send is None else send)

    return Handler


def _etag(body: bytes) -> str:
    return f'"{hashlib.md5(body).hexdigest()}"'


def _dechunk(body: bytes) -> bytes:
    out = b""
    while body:
        head, _, rest = body.partition(b"\r\n")
        size = int(head.split(b";")[0], 16)
        if size == 0:
            break
        out += rest[:size]
        body = rest[size + 2 :]
    return out
