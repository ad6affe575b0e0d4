"""Debian's Chromium without a window, driven by its DevTools protocol over a pipe, by Python alone."""
import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.parse

PROGRAM = shutil.which("chromium")
PATIENCE = 60  # seconds for an answer: a busy machine is slow


class Browser:
    """with Browser() as browser: a page of it that reaches no network."""

    def __init__(self):
        self.profile = tempfile.mkdtemp(prefix="viaduct-browser-")
        fds = []
        for fd in (*os.pipe(), *os.pipe()):  # away from 3 and 4, which the browser reads and writes
            fds.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10))
            os.close(fd)
        their_input, self.send_to, self.receive_from, their_output = fds
        words = [PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--disable-default-apps", "--disable-sync",
                 "--hide-scrollbars", "--proxy-server=127.0.0.1:9", "--remote-debugging-pipe", f"--user-data-dir={self.profile}"]
        connect = f'exec "$@" 3<&{their_input} 4>&{their_output} {their_input}<&- {their_output}>&-'
        self.process = subprocess.Popen(["bash", "-c", connect, "bash", *words], pass_fds=(their_input, their_output),
                                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                        start_new_session=True)
        os.close(their_input)
        os.close(their_output)
        self.number, self.rest, self.session, self.events = 0, b"", None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.session = None
            self.call("Browser.close")
            self.process.wait(PATIENCE)
        except (OSError, EOFError, TimeoutError, subprocess.TimeoutExpired):
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self.send_to)
        os.close(self.receive_from)
        shutil.rmtree(self.profile, ignore_errors=True)

    def message(self):
        """The next message of the browser."""
        end = time.monotonic() + PATIENCE
        while b"\0" not in self.rest:
            if not select.select([self.receive_from], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            found = os.read(self.receive_from, 1 << 16)
            if not found:
                raise EOFError("the browser has ended")
            self.rest += found
        text, self.rest = self.rest.split(b"\0", 1)
        return json.loads(text)

    def call(self, method, **parameters):
        self.number += 1
        words = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            words["sessionId"] = self.session
        data = json.dumps(words).encode() + b"\0"
        while data:
            data = data[os.write(self.send_to, data):]
        while True:
            found = self.message()
            if found.get("id") == self.number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                return found["result"]
            self.events.append(found)

    def load(self, path):
        """Opens a file and waits until it is there."""
        self.events.clear()
        self.call("Page.navigate", url="file://" + urllib.parse.quote(os.path.abspath(path)))
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.message())

    def evaluate(self, expression):
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def press(self, key, code):
        """A key of the keyboard, for the element that has the focus."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind, words in (("keyDown", text), ("keyUp", {})):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **words)

    def width(self, pixels, height=800):
        self.call("Emulation.setDeviceMetricsOverride", width=pixels, height=height, deviceScaleFactor=1, mobile=False)

    def dark(self, dark):
        value = "dark" if dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def picture(self, path):
        """The whole page as PNG."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        with open(path, "wb") as file:
            file.write(base64.b64decode(found["data"]))

    def complaints(self):
        """What the console, the policy and scripts complained about, and addresses that were asked for, but the page's."""
        found = []
        for event in self.events:
            method, words = event.get("method", ""), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(str(words["exceptionDetails"]))
            elif method == "Runtime.consoleAPICalled" and words["type"] in ("error", "warning", "assert"):
                found.append(str(words["args"]))
            elif method == "Log.entryAdded" and words["entry"]["level"] in ("error", "warning"):
                found.append(words["entry"]["text"])
            elif method == "Network.requestWillBeSent" and words["type"] != "Document":
                found.append(words["request"]["url"])
        return found
