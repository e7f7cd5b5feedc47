"""A real Chromium without a window, for the tests of the page. Nothing it does may take long."""

from __future__ import annotations

import importlib.util
import os
import shutil
from contextlib import contextmanager

# Where there are several, a machine's chromedriver is the one of Google's.
BROWSERS = ("google-chrome", "google-chrome-stable", "chrome", "chromium", "chromium-browser")
DRIVERS = ("chromedriver", "chromium.chromedriver")
# Seconds after which a call to the browser is an error.
PATIENCE = 30


def _first_of(names):
    return next(filter(None, map(shutil.which, names)), None)


def lacking():
    """Say what there is not of all that it takes; nothing if it is all there."""
    if importlib.util.find_spec("selenium") is None:
        return "the library selenium (of the extra 'test')"
    if _first_of(BROWSERS) is None:
        return f"a browser ({', '.join(BROWSERS)})"
    if _first_of(DRIVERS) is None:
        return "chromedriver (Debian: chromium-driver)"
    return ""


@contextmanager
def chromium(reaches=""):
    """Start the browser, which can reach no network but the host ``reaches``, and end it."""
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = _first_of(BROWSERS)
    for argument in _arguments(reaches):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.timeouts = {"pageLoad": PATIENCE * 1000, "script": PATIENCE * 1000, "implicit": 0}
    driver = Chrome(options, ChromeService(_first_of(DRIVERS)))
    try:
        driver.command_executor.client_config.timeout = PATIENCE
        yield Browser(driver)
    finally:
        driver.quit()


def _arguments(reaches):
    yield "--headless=new"
    yield "--disable-dev-shm-usage"
    yield "--disable-background-networking"
    yield "--host-resolver-rules=MAP * ~NOTFOUND" + (f", EXCLUDE {reaches}" if reaches else "")
    yield "--hide-scrollbars"
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        yield "--no-sandbox"  # root may not have one


class Browser:
    """What a visitor of a page does and sees."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, path, width=1200, height=900, dark=False, touch=False):
        """Show the page at ``path`` on a screen of this size, in CSS pixels."""
        self.screen(width, height, touch)
        self.devtools("Emulation.setTouchEmulationEnabled", enabled=touch)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])
        self.driver.get(path.resolve().as_uri())

    def screen(self, width, height, touch=False):
        """Give the screen this size, in CSS pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": touch}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)

    def devtools(self, command, **parameters):
        return self.driver.execute_cdp_cmd(command, parameters)

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def complaints(self):
        """Return what the console holds, and forget it."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def text(self, identity):
        return self.run("return document.getElementById(arguments[0]).textContent", identity)

    def value(self, identity):
        """Return the number that a data element holds, in full."""
        text = self.run("return document.getElementById(arguments[0]).value", identity)
        return float(text) if text else None

    def middle(self, selector, row=0, column=0, grid=(1, 1)):
        """Return where the cell of a grid over an element is, having scrolled it into view."""
        self.run("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
        box = self.run(
            "const b = document.querySelector(arguments[0]).getBoundingClientRect();"
            "return [b.x, b.y, b.width, b.height]",
            selector,
        )
        across, down = (column + 0.5) / grid[1], (row + 0.5) / grid[0]
        return {"x": box[0] + across * box[2], "y": box[1] + down * box[3]}

    def hover(self, place):
        self.devtools("Input.dispatchMouseEvent", type="mouseMoved", **place)

    def click(self, place, count=1):
        self.hover(place)
        for number in range(1, count + 1):
            for kind in ("mousePressed", "mouseReleased"):
                event = {"type": kind, "button": "left", "clickCount": number, **place}
                self.devtools("Input.dispatchMouseEvent", **event)

    def tap(self, place):
        self.devtools("Input.dispatchTouchEvent", type="touchStart", touchPoints=[place])
        self.devtools("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def press(self, *keys):
        """Press keys, by their names in Selenium's ``Keys`` or as characters, one after another."""
        from selenium.webdriver import ActionChains, Keys

        actions = ActionChains(self.driver, duration=0)
        for key in keys:
            actions.send_keys(getattr(Keys, key, key))
        actions.perform()

    def shift(self, key):
        from selenium.webdriver import ActionChains, Keys

        held = ActionChains(self.driver, duration=0).key_down(Keys.SHIFT)
        held.send_keys(getattr(Keys, key)).key_up(Keys.SHIFT).perform()

    def screenshot(self, path):
        self.driver.save_screenshot(str(path))
