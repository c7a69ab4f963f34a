"""A local HTTP server that serves files and misbehaves on demand: drops, lies, stalls, refuses."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class FileServer:
    """What is served, and how.

    Attributes:
        files: content by path, such as ``/a/model.pth``.
        faults: one word per coming request, used up in order; with none left the server behaves. ``drop:N`` closes the
            connection after N bytes of the body; ``status:CODE`` answers CODE; ``long:N`` and ``short:N`` state N bytes
            too many or too few; ``no_range`` sends the whole file; ``no_length`` states none; ``other_range`` sends
            another part than was asked for; ``wrong`` sends other bytes; ``stall`` is silent for two seconds;
            ``retry:S`` answers 503 and asks to wait S seconds; ``moved`` sends to the same path; ``ok`` behaves.
        always: fault of every request when ``faults`` is used up; "" behaves.
        ranges: Range header of every request that came, "" for none.
        knows_ranges: False sends the whole file whatever is asked for.
        etag: names the version of the files; a Range with another If-Range gets the whole file.
        pause_s: seconds between two pieces of 64 KiB.
    """

    files: dict[str, bytes]
    faults: list[str] = field(default_factory=list)
    always: str = ""
    ranges: list[str] = field(default_factory=list)
    etag: str = '"one"'
    knows_ranges: bool = True
    pause_s: float = 0.0
    url: str = ""

    @contextmanager
    def running(self) -> Iterator[FileServer]:
        """Serve on a free port of this machine; ``url`` says which."""
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer(served, self)

            def log_message(self, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def answer(served: FileServer, request: BaseHTTPRequestHandler) -> None:
    """Answer one request as the next fault says."""
    wanted = request.headers.get("Range", "")
    served.ranges.append(wanted)
    fault, _, number = (served.faults.pop(0) if served.faults else served.always).partition(":")
    content = served.files.get(request.path)
    if fault == "stall":
        time.sleep(2.0)
        return
    if fault == "moved":
        request.send_response(302)
        request.send_header("Location", f"{served.url}{request.path}")
        request.send_header("Content-Length", "0")
        request.end_headers()
        return
    if fault in {"status", "retry"} or content is None:
        request.send_response(int(number) if fault == "status" else 503 if fault == "retry" else 404)
        if fault == "retry":
            request.send_header("Retry-After", number)
        request.send_header("Content-Length", "0")
        request.end_headers()
        return
    if fault == "wrong":
        content = bytes(byte ^ 0x55 for byte in content)
    start = (
        int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and fault != "no_range" and served.knows_ranges else 0
    )
    if request.headers.get("If-Range", served.etag) != served.etag:
        start = 0
    if start and start >= len(content):
        request.send_response(416)
        request.send_header("Content-Range", f"bytes */{len(content)}")
        request.send_header("Content-Length", "0")
        request.end_headers()
        return
    if fault == "other_range":
        start = max(start - 10, 1)
    body = content[start:]
    length = len(body) + {"long": int(number or 0), "short": -int(number or 0)}.get(fault, 0)
    request.send_response(206 if start else 200)
    if start:
        request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{start + length}")
    if fault != "no_length":
        request.send_header("Content-Length", str(length))
    request.send_header("ETag", served.etag)
    request.end_headers()
    body = body[: int(number)] if fault == "drop" else body[:length]
    for offset in range(0, len(body), 1 << 16):
        try:
            request.wfile.write(body[offset : offset + (1 << 16)])
            request.wfile.flush()
        except OSError:
            return
        time.sleep(served.pause_s)
    request.close_connection = True
