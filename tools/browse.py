"""The site in a real browser, as wide as a desk's and a phone's: what overflows, is missing, complains.

The one idea: a page is right where nothing is wider than the window, every image has pixels, and the
console is silent; that is asked of the browser, and pictures of each page are left to be looked at. Needs
Chromium (``apt-get install chromium``, or CHROMIUM=path) and playwright; where there is none, it says so.
"""

import os
import shutil
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).parents[1]
SITE, PICTURES = ROOT / "out" / "site", ROOT / "out" / "browser"
WIDTHS = {"desk": (1440, 900), "phone": (390, 844)}
SCHEMES = ("light", "dark")
PATIENCE = 300_000  # milliseconds for a page, on a machine that does other things too

# What sticks out of the window and can't be scrolled to inside of something of its own.
OVERFLOWS = """() => {
  const page = document.documentElement, width = page.clientWidth, found = [];
  if (page.scrollWidth > width + 1) found.push("the page is " + page.scrollWidth + " wide");
  for (const one of document.querySelectorAll("article *")) {
    const box = one.getBoundingClientRect();
    if (box.right <= width + 1 || box.width === 0) continue;
    let up = one.parentElement, scrolls = false;
    for (; up && up !== document.body; up = up.parentElement)
      if (["auto", "scroll", "hidden"].includes(getComputedStyle(up).overflowX)) scrolls = true;
    if (!scrolls) found.push(one.tagName.toLowerCase() + " reaches to " + Math.round(box.right));
  }
  return found.slice(0, 5);
}"""
IMAGES = """() => [...document.querySelectorAll("article img")]
  .filter(one => getComputedStyle(one).display !== "none" && one.naturalWidth === 0).map(one => one.src)"""


class Quiet(SimpleHTTPRequestHandler):
    """Serves the site, and writes no log."""

    def log_message(self, *_: object) -> None:
        pass


def pages() -> list[str]:
    """Addresses from the site's root."""
    found = sorted(path.relative_to(SITE).parent.as_posix() for path in SITE.rglob("index.html"))
    return ["" if one == "." else f"{one}/" for one in found]


def look(browser: object, base: str, scheme: str) -> list[str]:
    """What is wrong, a line each. A page is loaded once, and seen at each width."""
    context = browser.new_context(color_scheme=scheme)  # type: ignore[attr-defined]
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed", lambda request: said.append(f"{request.url} failed"))
    page.on("response", lambda r: said.append(f"{r.url}: {r.status}") if r.status >= 400 else None)
    # Nothing from outside is asked for, and nothing outside can be what a page needs.
    page.route(
        "**/*", lambda route: route.continue_() if route.request.url.startswith(base) else route.abort()
    )
    found: list[str] = []
    for address in pages():
        page.goto(base + address, wait_until="load")
        name = address.strip("/").replace("/", "-") or "index"
        for size, (width, height) in WIDTHS.items():
            page.set_viewport_size({"width": width, "height": height})
            said += page.evaluate(OVERFLOWS) + [f"no pixels: {one}" for one in page.evaluate(IMAGES)]
            page.screenshot(path=PICTURES / f"{name}-{size}-{scheme}.png", full_page=False)
            found += [f"{address or 'index'} ({size}, {scheme}): {one}" for one in said]
            said.clear()
    context.close()
    return found


def main() -> int:
    """1 where something is wrong; 0 also where there is no browser, with the reason."""
    program = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        print("skipped: no browser here; apt-get install chromium, or set CHROMIUM to one")
        return 0
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError as error:
        print(f"skipped: {error}; pip install playwright")
        return 0
    if not (SITE / "index.html").exists():
        print(f"there is no site in {SITE}: run make docs")
        return 1
    PICTURES.mkdir(parents=True, exist_ok=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}/"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        found = [line for scheme in SCHEMES for line in look(browser, base, scheme)]
        browser.close()
    server.shutdown()
    print(
        "\n".join(found) or f"{len(pages())} pages at {len(WIDTHS)} widths, light and dark: nothing wrong"
    )
    print(f"pictures of them: {PICTURES}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
