"""Pages in a headless Chromium with the network off, and what is wrong with them."""

import json
import shutil

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
# A formula must be drawn; what is left of its marks outside of code is one that was not.
_LOOK = """
const marks = [];
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const text = walk.currentNode, parent = text.parentElement;
  if (parent.closest("code, pre, script, style, mjx-container")) continue;
  if (/\\$\\$|\\\\\\(|\\\\\\[/.test(text.data)) marks.push(text.data.trim().slice(0, 80));
}
const images = [...document.querySelectorAll("img")];
return {
  marks,
  drawn: document.querySelectorAll("mjx-container").length,
  wrong: [...document.querySelectorAll("svg [data-mjx-error]")].map(
    (e) => e.getAttribute("data-mjx-error")),
  unloaded: images.filter((i) => !i.complete || !i.naturalWidth).map((i) => i.src),
  silent: images.filter((i) => !i.alt.trim()).map((i) => i.src),
  images: images.length,
};
"""
_SETTLE = """
Promise.all([document.fonts.ready, window.MathJax?.startup?.promise]).then(arguments[0]);
"""


class Browser:
    """A Chromium that can reach nothing; `close` ends it."""

    def __init__(self) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for word in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking"):
            options.add_argument(f"--{word}")
        options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        self.driver.set_script_timeout(120)  # of a machine that does other things beside
        self.run = self.driver.execute_script

    def close(self) -> None:
        self.driver.quit()

    def open(self, page, width=1280, dark=False):
        """Load a file; return what it asked for elsewhere, what the console says, what it shows."""
        self.screen(width, dark)
        self.driver.get(page.as_uri())
        self.driver.execute_async_script(_SETTLE)
        return {**self.run(_LOOK), "console": self.console(), "outside": self.outside()}

    def screen(self, width, dark=False):
        """Set the width of the window in pixels, and the theme that the reader prefers."""
        self.width = width
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [theme]})

    def console(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def outside(self):
        """Requests since the last call that are no files."""
        found = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        sent = [m["params"] for m in found if m["method"] == "Network.requestWillBeSent"]
        urls = [params["request"]["url"] for params in sent]
        return [url for url in urls if not url.startswith(("file:", "data:", "blob:"))]

    def overflow(self):
        """By how many pixels the page is wider than the screen, to which a phone zooms out."""
        return self.run("return document.documentElement.scrollWidth") - self.width

    def background(self):
        """Brightness of the page's background, 0 to 255."""
        colour = self.run("return getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in colour.strip("rgba()").split(",")[:3]) / 3
