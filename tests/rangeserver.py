"""A web server in a process of its own that serves a folder by byte ranges, and fails as it is told.

In a process of its own because GDAL reads without leaving the interpreter to a server's thread: both would wait.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

CONTROL = "/control"
#: Seconds that a stalled answer takes: longer than any test's time-out.
STALL_SECONDS = 60.0


@dataclass(frozen=True)
class RangeServer:
    """A server that runs. ``url`` is what the folder's files lie below."""

    url: str

    def fail(self, fault: str = "", *, after: int = 0, times: int = -1, only: str = "") -> None:
        """Forget the requests so far; let ``times`` answers (-1: all) after the first ``after`` fail.

        Args:
            fault: ``status:CODE`` answers CODE; ``cut:N`` closes the connection after N bytes of the body, ``stop:N``
                falls silent there and ``stall`` before any; ``short:N`` leaves out N bytes and states no more; ""
                behaves.
            after: answers that are still good.
            times: answers that fail then.
            only: part of the paths that count; "" is all.
        """
        self._control({"fault": fault, "after": after, "times": times, "only": only})

    def requests(self) -> list[dict[str, Any]]:
        """Return method, path, range (text), sent (bytes of the body) and fault of every request since :meth:`fail`."""
        found: list[dict[str, Any]] = self._control(None)
        return found

    def _control(self, wish: dict[str, Any] | None) -> Any:
        body = None if wish is None else json.dumps(wish).encode()
        with urllib.request.urlopen(self.url + CONTROL, data=body, timeout=10) as answer:
            return json.load(answer)


@contextmanager
def serve(folder: Path) -> Iterator[RangeServer]:
    """Serve a folder on a free port of this machine."""
    with subprocess.Popen([sys.executable, __file__, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield RangeServer(f"http://127.0.0.1:{int(process.stdout.readline())}")
        finally:
            process.kill()


class _Handler(BaseHTTPRequestHandler):
    """Answers GET, HEAD and the control requests."""

    protocol_version = "HTTP/1.1"
    folder = Path()
    plan: ClassVar[dict[str, Any]] = {"fault": "", "after": 0, "times": -1, "only": ""}
    log: ClassVar[list[dict[str, Any]]] = []
    lock = threading.Lock()

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        wish = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            type(self).plan = wish
            self.log.clear()
        self._send_json({})

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        if self.path == CONTROL:
            with self.lock:
                found = list(self.log)
            self._send_json(found)
        else:
            self._serve()

    def _send_json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _next_fault(self, entry: dict[str, Any]) -> tuple[str, int]:
        """Note a request, and say how its answer fails."""
        with self.lock:
            self.log.append(entry)
            plan, fault = self.plan, ""
            if plan["only"] in self.path:
                plan["after"] -= 1
                if plan["after"] < 0 and plan["times"] != 0:
                    plan["times"] -= 1
                    fault = plan["fault"]
            entry["fault"] = fault
        kind, _, number = fault.partition(":")
        return kind, int(number or 0)

    def _serve(self) -> None:
        path, wanted = self.path.partition("?")[0], self.headers.get("Range", "")
        entry = {"method": self.command, "path": path, "range": wanted, "sent": 0}
        kind, number = self._next_fault(entry)
        if kind == "stall":
            time.sleep(STALL_SECONDS)
            self.close_connection = True
            return
        file = self.folder / path.lstrip("/")
        if kind == "status" or not file.is_file():
            self.send_response(number if kind == "status" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size = file.stat().st_size
        first, last = 0, size - 1
        if wanted:
            start, _, stop = wanted.removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(stop or last), last)
        if first >= size:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if kind == "short":
            last = max(first, last - number)
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Last-Modified", self.date_time_string(int(file.stat().st_mtime)))
        self.end_headers()
        if self.command == "HEAD":
            return
        with file.open("rb") as stream:
            stream.seek(first)
            body = stream.read(last - first + 1)
        if kind in ("cut", "stop"):
            body = body[:number]
            self.close_connection = True
        entry["sent"] = len(body)
        with suppress(OSError):  # the reader has hung up
            self.wfile.write(body)
            self.wfile.flush()
            if kind == "stop":
                time.sleep(STALL_SECONDS)


def main(folder: str) -> None:
    """Serve, after saying on which port."""
    _Handler.folder = Path(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1])
