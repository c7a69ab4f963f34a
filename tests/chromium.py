"""Chromium without a window, driven by the DevTools protocol through a pair of pipes: no socket, no further package."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

#: Seconds that an answer may take.
_PATIENCE = 60.0


def find_chromium() -> str:
    """Return the program; skip the test without it, or fail under ``RTMDET_REQUIRE_CHROMIUM=1``."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if program := shutil.which(name):
            return program
    if os.environ.get("RTMDET_REQUIRE_CHROMIUM") == "1":
        pytest.fail("RTMDET_REQUIRE_CHROMIUM=1 but there is no chromium; apt-get install chromium")
    pytest.skip("needs chromium, which is not installed")


def _high_pipe() -> tuple[int, int]:
    """Return a pipe's ends to read and to write, on descriptors other than the browser's 3 and 4."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return high[0], high[1]


class Chromium:
    """A browser with one page; a context manager.

    Attributes:
        faults: what the page's console said as a warning or an error, exceptions, and requests but for its own file.
    """

    def __init__(self, profile: Path) -> None:
        # The browser reads commands from descriptor 3 and answers on 4, each message ended by a zero byte
        to_read, self._to = _high_pipe()
        self._from, to_write = _high_pipe()
        arguments = "--headless=new --no-sandbox --disable-gpu --no-first-run --remote-debugging-pipe about:blank"
        command = [find_chromium(), f"--user-data-dir={profile}", "--window-size=1000,700", *arguments.split()]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write}', "bash", *command],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._numbers, self._rest, self._session = itertools.count(1), b"", ""
        self.faults: list[str] = []
        self.url = ""
        (target,) = (t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._to)
        os.close(self._from)
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Run a command of the protocol and return its result; notes of faults are kept on the way."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + _PATIENCE
        while b"\0" not in self._rest:
            is_ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            assert is_ready, f"chromium did not answer within {_PATIENCE:g} s"
            part = os.read(self._from, 1 << 16)
            assert part, "chromium ended"
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)

    def _note(self, event: dict[str, Any]) -> None:
        method, values = event.get("method"), event.get("params", {})
        is_bad = (
            method == "Runtime.exceptionThrown"
            or (method == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning", "assert"))
            or (method == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"))
            or (method == "Page.javascriptDialogOpening")
            or (
                method == "Network.requestWillBeSent"
                and values["request"]["url"] != self.url
                and not values["request"]["url"].startswith("data:")
            )
        )
        if is_bad:
            self.faults.append(json.dumps(event)[:600])

    def open(self, path: Path) -> None:
        """Load a page from the disk, and wait until its body says that it is ready."""
        self.url, self.faults = path.resolve().as_uri(), []
        self.send("Page.navigate", url=self.url)
        deadline = time.monotonic() + _PATIENCE
        while self.run("document.body?.dataset.ready") != "yes":
            assert time.monotonic() < deadline and not self.faults, self.faults
            time.sleep(0.02)
        self.settle()

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression, a promise's too."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def settle(self) -> None:
        """Wait until what changed is drawn."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """Send a mouse event: "Pressed", "Moved", "Released" or "Wheel", at CSS px of the window."""
        self.send("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **more)

    def click(self, x: float, y: float) -> None:
        """Click with the left button."""
        for kind, buttons in (("Moved", 0), ("Pressed", 1), ("Released", 0)):
            button = {} if kind == "Moved" else {"button": "left", "clickCount": 1}
            self.mouse(kind, x, y, buttons=buttons, **button)
        self.settle()

    def key(self, key: str, text: str = "") -> None:
        """Press a key and let it go."""
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **({"text": text} if text else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)
        self.settle()
