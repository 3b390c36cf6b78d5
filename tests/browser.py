"""A headless Chromium looks at a page: what it logs, what it asks of the network, how wide the page is, a picture.

Chromium is spoken to over its own debugging pipe (file descriptors 3 and 4, JSON messages ended by a zero byte), so that
no library is needed.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    """``$MEDTRAIN_BROWSER``, or the first of the usual names on PATH."""
    return os.environ.get("MEDTRAIN_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)


@dataclass
class Sight:
    """``problems``: console messages from warnings up, exceptions, refused content; ``requests``: addresses asked for;
    ``width``: of the document, CSS pixels; ``found``: what ``ask`` (JavaScript) came to; ``png``: the whole page."""

    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    width: int = 0
    found: object = None
    png: bytes = b""


def look_at(path: Path, tmp_path: Path, *, width: int, height: int = 900, dark: bool = False, ask: str = "0") -> Sight:
    """Open a file at a window ``width`` CSS pixels wide (a phone below 600) and report."""
    to_browser, ours = os.pipe()
    theirs, from_browser = os.pipe()

    def place() -> None:
        # By way of high numbers, lest one of the two lie where the other is to go.
        high = [os.dup2(fd, 60 + i) for i, fd in enumerate((to_browser, from_browser))]
        os.dup2(high[0], 3)
        os.dup2(high[1], 4)

    profile = tmp_path / f"profile-{len(list(tmp_path.glob('profile-*')))}"
    command = [
        find_browser(),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--hide-scrollbars",
        f"--user-data-dir={profile}",
        "--remote-debugging-pipe",
        "about:blank",
    ]
    process = subprocess.Popen(command, preexec_fn=place, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(to_browser)
    os.close(from_browser)
    try:
        return _Session(ours, theirs).look(path, width, height, dark, ask)
    finally:
        os.close(ours)
        os.close(theirs)
        process.kill()
        process.wait()


class _Session:
    def __init__(self, write: int, read: int):
        self.write, self.read, self.buffer, self.sent = write, read, b"", 0
        self.sight, self.loaded, self.session = Sight(), False, None

    def look(self, path: Path, width: int, height: int, dark: bool, ask: str) -> Sight:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.loaded = False
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not self.loaded:
            self.receive()
        self.sight.width = self.evaluate("document.documentElement.scrollWidth")
        self.sight.found = self.evaluate(ask)
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        self.sight.png = base64.b64decode(picture["data"])
        return self.sight

    def evaluate(self, expression: str):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def call(self, method: str, **params) -> dict:
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        number = self.sent
        while True:
            answer = self.receive()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def receive(self) -> dict:
        deadline = time.monotonic() + 120
        while b"\0" not in self.buffer:
            assert select.select([self.read], [], [], max(0, deadline - time.monotonic()))[0], "the browser says nothing"
            part = os.read(self.read, 1 << 20)
            assert part, "the browser has ended"
            self.buffer += part
        raw, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(raw)
        params = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self.loaded = True
            case "Network.requestWillBeSent":
                self.sight.requests.append(params["request"]["url"])
            case "Runtime.exceptionThrown":
                self.sight.problems.append(json.dumps(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.sight.problems.append(json.dumps(params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.sight.problems.append(params["entry"]["text"])
        return message
