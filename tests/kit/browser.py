"""Headless Chromium on the page of a member."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.kit.basics import eventually


def start_browser():
    """Return a browser; skip the test where there is none, or fail if it must be there."""
    try:
        from selenium import webdriver
    except ImportError:
        webdriver = None
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (webdriver and program and driver):
        why = "needs selenium, and Debian's chromium and chromium-driver"
        if os.environ.get("PYETCD_BROWSER") == "required":      # .ci/run installs them
            pytest.fail(why)
        pytest.skip(why)
    options = webdriver.ChromeOptions()
    options.binary_location = program
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--no-first-run", "--disable-extensions", "--disable-background-networking"):
        options.add_argument(word)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


class Page:
    """The page of one member, as its reader sees it."""

    def __init__(self, browser, url, view="overview", *, width=1200, height=800, dark=False):
        self.browser, self.url = browser, url
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": False})
        self.prefer(dark=dark)
        browser.get("about:blank")      # a hash alone would not load it again
        browser.get_log("browser")
        browser.get(f"{url}/ui#/{view}")
        self.until("return state !== null")

    def prefer(self, *, dark):
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def run(self, script, *arguments):
        """Run a script; what it does may be seen later."""
        return self.browser.execute_script(script, *arguments)

    def until(self, script, *arguments):
        """Return the script's first true value."""
        return eventually(lambda: self.run(script, *arguments), what=script)

    def text(self, selector="body"):
        """What can be read there; "" if it is not there."""
        return self.run(
            "const node = document.querySelector(arguments[0]); return node ? node.innerText : ''",
            selector)

    def shows(self, text, selector="body"):
        """Wait until it can be read."""
        eventually(lambda: text in self.text(selector), what=f"{text!r} in {selector}")

    def click(self, selector, text=""):
        """Press what has this text, as soon as it is there and can be pressed."""
        self.until(
            "const node = [...document.querySelectorAll(arguments[0])].find(node =>"
            " node.innerText.includes(arguments[1]) && node.offsetParent && !node.disabled);"
            " if (node) node.click(); return !!node", selector, text)

    def type(self, selector, text):
        """Replace the text of a field."""
        self.until(
            "const node = document.querySelector(arguments[0]); if (!node) return false;"
            " node.value = arguments[1]; node.dispatchEvent(new Event('input', {bubbles: true}));"
            " return true", selector, text)

    def holds(self, text):
        """Wait until the key that is shown has this value."""
        self.until("const node = document.getElementById('value');"
                   " return node && node.value === arguments[0]", text)

    def press(self, *keys):
        """Press keys, wherever the focus is."""
        from selenium.webdriver.common.action_chains import ActionChains
        ActionChains(self.browser).send_keys(*keys).perform()

    def complaints(self):
        """What the console says, answers of the server with an error left out."""
        return [entry["message"] for entry in self.browser.get_log("browser")
                if entry["source"] != "network"]
