"""Take the pictures of the page that are in docs/: a cluster under load, seen by Chromium.

    python3 contrib/screenshots.py [-seconds 300] [DIRECTORY]

Needs Debian's chromium and chromium-driver, and selenium.  The charts show five minutes, so that
is how long it takes to have them full.  DIRECTORY is docs/ if it is not given.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import logging
import math
import random
import struct
import sys
import threading
import time
import urllib.parse
import zlib
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pyetcd  # noqa: E402

KEYS = {
    "/config/web/port": "8080", "/config/web/workers": "12", "/config/web/host": "0.0.0.0",
    "/config/web/limits": json.dumps(
        {"requests": {"per_second": 250, "burst": 400}, "body_bytes": 1048576,
         "allow": ["10.0.0.0/8", "192.168.0.0/16"]}, indent=2),
    "/config/database/url": "postgresql://db.internal/orders", "/config/database/pool": "24",
    "/features/dark_mode": "true", "/features/search": "beta",
    "/services/web/10.0.0.4": '{"port": 8080, "zone": "a"}',
    "/services/web/10.0.0.5": '{"port": 8080, "zone": "b"}',
    "/services/mail/10.0.0.9": '{"port": 25, "zone": "a"}', "/jobs/nightly": "done",
    "/jobs/report": "running", "/version": "2026.11",
}


class Load:
    """Reads and writes at a rate that changes, and some watches, until stop() is called."""

    def __init__(self, url: str) -> None:
        self._address = urllib.parse.urlsplit(url).netloc
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(seed,), daemon=True) for seed in range(3)]
        self._watches = [http.client.HTTPConnection(self._address) for _ in range(9)]
        for watch in self._watches:
            watch.request("GET", "/v2/keys/services?wait=true&recursive=true&stream=true")
        for thread in self._threads:
            thread.start()

    def _run(self, seed: int) -> None:
        chance = random.Random(seed)
        connection = http.client.HTTPConnection(self._address)
        started, count = time.monotonic(), 0
        while not self._stopped.is_set():
            count += 1
            wave = 1 + 0.6 * math.sin((time.monotonic() - started) / 23 + seed)
            method, key = chance.choice((("GET", "/config/web/port"), ("GET", "/features/search"),
                                         ("PUT", f"/load/{count // 40 % 900}")))
            body = f"value={count}" if method == "PUT" else None
            kind = {"Content-Type": "application/x-www-form-urlencoded"} if body else {}
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection.request(method, "/v2/keys" + key, body, kind)
                connection.getresponse().read()
            self._stopped.wait(chance.random() * 0.016 / max(wave, 0.1))

    def stop(self) -> None:
        """End the threads."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        for watch in self._watches:
            watch.close()


def put(url: str, key: str, **form: object) -> None:
    """Write one key."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc)
    connection.request("PUT", "/v2/keys" + key, urllib.parse.urlencode(form),
                       {"Content-Type": "application/x-www-form-urlencoded"})
    connection.getresponse().read()


def start_chromium(width: int, height: int) -> webdriver.Chrome:
    """Return a headless browser with a window of this size."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(word)
    browser = webdriver.Chrome(
        options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": height, "deviceScaleFactor": 1, "mobile": False})
    return browser


def take(browser: webdriver.Chrome, url: str, *, dark: bool) -> bytes:
    """Return one picture."""
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get("about:blank")          # a hash alone would load nothing
    browser.get(url)
    WebDriverWait(browser, 30).until(
        lambda page: page.find_element(By.ID, "health").text)
    time.sleep(2.5)                     # the charts, and what the view loads
    return browser.get_screenshot_as_png()


def with_palette(png: bytes) -> bytes:
    """Return a small PNG: with a palette of the 256 colours that most pixels have.

    Any other pixel gets the colour that is nearest.
    """
    chunks, at = {}, 8
    while at < len(png):
        size, name = struct.unpack(">I4s", png[at:at + 8])
        chunks[name] = chunks.get(name, b"") + png[at + 8:at + 8 + size]
        at += size + 12
    width, height, _, kind = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    channels = {2: 3, 6: 4}[kind]
    rows = unfilter(zlib.decompress(chunks[b"IDAT"]), width * channels, channels)
    counts: dict = {}
    pixels = [[row[x:x + 3] for x in range(0, len(row), channels)] for row in rows]
    for line in pixels:
        for pixel in line:
            counts[pixel] = counts.get(pixel, 0) + 1
    palette = sorted(counts, key=counts.__getitem__, reverse=True)[:256]
    nearest = {colour: number for number, colour in enumerate(palette)}
    for colour in counts.keys() - nearest.keys():
        nearest[colour] = min(range(len(palette)), key=lambda number: sum(
            (a - b) ** 2 for a, b in zip(palette[number], colour)))
    data = b"".join(b"\0" + bytes(nearest[pixel] for pixel in line) for line in pixels)
    head = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    out = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", head), (b"PLTE", b"".join(palette)),
                       (b"IDAT", zlib.compress(data, 9)), (b"IEND", b"")):
        crc = zlib.crc32(name + body)
        out += struct.pack(">I", len(body)) + name + body + struct.pack(">I", crc)
    return out


def unfilter(data: bytes, stride: int, step: int) -> list:
    """Return the rows of a picture, filters undone (PNG specification §9)."""
    rows, before = [], bytes(stride)
    for start in range(0, len(data), stride + 1):
        kind, row = data[start], bytearray(data[start + 1:start + 1 + stride])
        for x in range(stride if kind else 0):
            left = row[x - step] if x >= step else 0
            corner = before[x - step] if x >= step else 0
            row[x] = (row[x] + (
                0, left, before[x], (left + before[x]) // 2, paeth(left, before[x], corner)
            )[kind]) & 255
        before = bytes(row)
        rows.append(before)
    return rows


def paeth(a: int, b: int, c: int) -> int:
    """The predictor of PNG: the neighbour that is nearest to a + b - c."""
    p = a + b - c
    return min((a, b, c), key=lambda each: abs(p - each))


def main() -> None:
    """Start a cluster, let it work, take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=ROOT / "docs")
    parser.add_argument("-seconds", type=float, default=300)
    given = parser.parse_args()
    logging.getLogger("pyetcd").setLevel(logging.INFO)
    pictures = {}
    with contextlib.ExitStack() as stack:
        desk = stack.enter_context(contextlib.closing(start_chromium(1180, 800)))
        phone = stack.enter_context(contextlib.closing(start_chromium(390, 780)))
        cluster = stack.enter_context(pyetcd.LocalCluster(3))
        url = cluster.leader().client_url
        for key, value in KEYS.items():
            put(url, key, value=value)
        put(url, "/services/web/10.0.0.6", value='{"port": 8080, "zone": "c"}', ttl=3_000)
        stack.callback(Load(url).stop)
        time.sleep(given.seconds)
        for name, dark in (("light", False), ("dark", True)):
            pictures[f"page-{name}"] = take(desk, f"{url}/ui", dark=dark)
            for number in ("200", "250", "300"):        # the key has a history
                value = KEYS["/config/web/limits"].replace("250", number)
                put(url, "/config/web/limits", value=value)
            pictures[f"page-keys-{name}"] = take(
                desk, f"{url}/ui#/keys/config/web/limits", dark=dark)
        pictures["page-phone"] = take(phone, f"{url}/ui", dark=True)
    for name, png in pictures.items():
        path = given.directory / f"{name}.png"
        path.write_bytes(with_palette(png))
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
