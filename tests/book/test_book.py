"""The rendered book, as readers see it: offline, on a desk and on a phone, by day and by night.

`make book` comes first. The pages are served from this machine, and every other host is blocked.
"""

import functools
import http.server
import re
import shutil
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import axe_playwright_python
import pytest
import yaml
from playwright.sync_api import Error, sync_playwright

ROOT = Path(__file__).parents[2]
HTML = ROOT / "_build" / "html"
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --mute-audio"
).split()

pytestmark = pytest.mark.skipif(
    not (HTML / ".rendered").exists(), reason="the book is not built: run `make book` first"
)


def pages():
    """The pages that the table of contents names, as paths under the book's root."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    files = [entry["file"] for part in toc["parts"] for entry in part["chapters"]]
    return [f"{file}.html" for file in [toc["root"], *files]]


class Links(HTMLParser):
    """What a page refers to: (tag, address) pairs, and the names that may be linked to."""

    def __init__(self, page):
        super().__init__()
        self.found, self.anchors = [], set()
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("href", "src", "srcset", "poster", "data") and value:
                self.found.append((tag, value))
            elif name == "id":
                self.anchors.add(value)


@functools.cache
def links(path):
    return Links(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", pages())
def test_every_link_within_the_book_leads_somewhere(page):
    here = HTML / page
    assert here.is_file()
    for tag, address in links(here).found:
        parts = urlsplit(address)
        if parts.scheme or parts.netloc:
            continue
        target = (here.parent / unquote(parts.path)).resolve() if parts.path else here
        assert target.is_file(), f"{page}: <{tag}> leads to {address}, which does not exist"
        if parts.fragment and target.suffix == ".html" and tag == "a":
            assert unquote(parts.fragment) in links(target).anchors, f"{page}: {address}"


@pytest.mark.parametrize("page", pages())
def test_a_page_takes_nothing_from_another_host(page):
    remote = [
        (tag, address)
        for tag, address in links(HTML / page).found
        if tag not in ("a",) and urlsplit(address).scheme not in ("", "data")
    ]
    assert not remote


@pytest.mark.parametrize("page", [page for page in pages() if re.search(r"/\d\d[a-z]?_", page)])
def test_every_chapter_offers_its_notebook(page):
    offered = {urlsplit(address).path for _, address in links(HTML / page).found}
    assert f"../_sources/{page.removesuffix('.html')}.ipynb" in offered


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # one connection for many files

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128  # a page opens many connections at once; a full queue stalls it


@pytest.fixture(scope="module")
def site():
    """The address under which the book is served."""
    handler = functools.partial(QuietHandler, directory=HTML)
    with Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no Chromium: install it, for example with `apt-get install chromium`")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            args=[*FLAGS, "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"],
        )
        yield browser
        browser.close()


class Visitor:
    """A reader's window onto the book; remembers what went wrong."""

    def __init__(self, browser, site, width, theme):
        self.site, self.left, self.errors = site, [], []
        self.context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=theme
        )
        self.context.set_default_timeout(120_000)  # a busy machine is no failure
        self.context.route("**/*", self._route)
        self.page = self.context.new_page()
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _route(self, route):
        if route.request.url.startswith(self.site + "/"):
            route.continue_()
        else:
            self.left.append(route.request.url)
            route.abort()

    def _console(self, message):
        if message.type in ("error", "warning"):
            self.errors.append(f"{message.text} ({message.location.get('url', '')})")

    def go(self, address):
        answer = self.page.goto(f"{self.site}/{address}", wait_until="load")
        assert answer.ok, f"{address}: {answer.status}"
        return self.page


TYPESET = """async () => {
  const math = [...document.querySelectorAll(".math.notranslate")];
  if (math.length) {
    for (let i = 0; i < 200 && !window.MathJax?.startup?.promise; i++)
      await new Promise(done => setTimeout(done, 50));
    await window.MathJax.startup.promise;
  }
  await document.fonts.ready;
  return {
    all: math.length,
    bare: math.filter(e => !e.querySelector("mjx-container")).map(e => e.textContent),
    failed: [...document.querySelectorAll("mjx-merror, [data-mjx-error]")].map(e => e.textContent),
  };
}"""
NAMELESS = """() => [...document.images].filter(i => !(i.alt || "").trim()).map(i => i.outerHTML
  .slice(0, 200))"""
BROKEN = """() => [...document.images].filter(i => i.complete && !i.naturalWidth && i.currentSrc)
  .map(i => i.currentSrc.slice(0, 200))"""
WIDE = """() => {
  const page = document.documentElement;
  if (page.scrollWidth <= innerWidth) return [];
  return [`${page.scrollWidth} > ${innerWidth}`, ...[...document.querySelectorAll("body *")]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1)
    .map(e => `${e.tagName}.${e.className}`).slice(0, 10)];
}"""
THEME = "() => document.documentElement.dataset.theme"
AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js")
#: Rules that the markup of Sphinx itself breaks: attributes of a class that have no description,
#: and the roles that it gives the bibliography.
BROKEN_BY_SPHINX = ["definition-list", "aria-deprecated-role", "aria-required-children"]
INACCESSIBLE = """async (left_out) => {
  const rules = Object.fromEntries(left_out.map(rule => [rule, {enabled: false}]));
  const runOnly = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"];
  const options = {resultTypes: ["violations"], preload: false, runOnly, rules};
  const found = await axe.run(document, options);
  return found.violations.flatMap(rule => rule.nodes.map(node =>
    `${rule.id}: ${node.html.slice(0, 200)}: ${node.failureSummary}`));
}"""
#: Formulas that a reader who goes through the page by keyboard would have to pass.
TAB_STOPS = """() => [...document.querySelectorAll("mjx-container[tabindex='0']")].length"""


@pytest.mark.browser
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
def test_every_page_is_whole(browser, site, width, theme):
    visitor = Visitor(browser, site, width, theme)
    formulas = 0
    for address in pages():
        page = visitor.go(address)
        math = page.evaluate(TYPESET)
        formulas += math["all"]
        assert page.evaluate(THEME) == theme
        assert math["bare"] == [], f"{address}: mathematics that is not typeset"
        assert math["failed"] == [], f"{address}: mathematics with errors"
        assert page.evaluate(NAMELESS) == [], f"{address}: images without a description"
        assert page.evaluate(BROKEN) == [], f"{address}: images that did not load"
        assert page.evaluate(WIDE) == [], f"{address}: wider than the window"
        assert page.evaluate(TAB_STOPS) == 0, f"{address}: formulas in the tab order"
        page.evaluate(AXE.read_text(encoding="utf-8"))
        assert page.evaluate(INACCESSIBLE, BROKEN_BY_SPHINX) == [], address
        assert visitor.left == [], f"{address} asks another host"
        assert visitor.errors == [], f"{address}: errors in the console"
    assert formulas
    visitor.context.close()


@pytest.mark.browser
def test_other_hosts_are_really_out_of_reach(browser, site):
    visitor = Visitor(browser, site, 1280, "light")
    page = visitor.go(pages()[0])
    with pytest.raises(Error, match="Failed to fetch"):
        page.evaluate("() => fetch('https://elsewhere.invalid/')")
    assert visitor.left == ["https://elsewhere.invalid/"]
    visitor.context.close()


@pytest.mark.browser
def test_the_search_finds_covariate_shift(browser, site):
    visitor = Visitor(browser, site, 1280, "light")
    page = visitor.go("search.html?q=covariate+shift")
    page.wait_for_selector("#search-results ul.search li a")
    found = page.eval_on_selector_all(
        "#search-results ul.search li a", "all => all.map(a => a.getAttribute('href'))"
    )
    assert found[0].split("?")[0] == "chapters/01_internal_covariate_shift.html"
    page.wait_for_selector("#search-results p.context")
    for each in page.query_selector_all("#search-results p.context"):
        text = each.text_content()
        assert not re.search(r"\\[(a-z]|\.ipynb|Code:|Contents", text), f"not prose: {text}"
    page = visitor.go("search.html?q=gamma")
    page.wait_for_selector("#search-results ul.search li a")
    first = page.get_attribute("#search-results ul.search li a", "href")
    assert re.search(r"chapters/\d\d_", first), f"gamma is found first in {first}"
    assert visitor.left == []
    assert visitor.errors == []
    visitor.context.close()


@pytest.mark.browser
def test_the_ledger_can_be_filtered_searched_and_sorted(browser, site):
    visitor = Visitor(browser, site, 1280, "light")
    page = visitor.go("chapters/16_claims.html")
    rows = "[...document.querySelectorAll('#ledger tbody tr')]"

    def shown():
        return page.evaluate(f"() => {rows}.filter(row => !row.hidden).map(row => row.id)")

    papers = shown()
    whose, _, verdict = page.locator(".bn-controls select").all()
    whose.select_option("")
    everything = shown()
    assert set() < set(papers) < set(everything)
    verdict.select_option("not reproduced")
    failed = shown()
    assert 0 < len(failed) < len(everything)
    assert page.get_by_text(f"{len(failed)} of {len(everything)} claims").is_visible()
    page.locator(".bn-controls input").fill("Inception")
    assert 0 < len(shown()) < len(failed)
    page.locator(".bn-controls input").fill("")
    column = page.locator("#ledger th button").nth(1)
    column.click()
    ascending = shown()
    column.click()
    assert shown() == ascending[::-1]
    assert shown() != failed
    assert visitor.errors == []
    visitor.context.close()
    again = Visitor(browser, site, 375, "dark")
    page = again.go(f"chapters/16_claims.html#{everything[-1]}")
    assert page.locator(f"#{everything[-1]}").is_visible()
    again.context.close()
