"""The pages in a real browser: nothing is asked for, nothing is said to the console, nothing overflows."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from made_runs import make_run

from sft_jax.report.compare import compare, write_comparison
from sft_jax.report.page import write_report

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DARK = "--blink-settings=preferredColorScheme=0"
# A window is never narrower than 500 pixels, so the page is shown in a frame, and looked at from outside of it.
FRAME = """<!doctype html><meta charset="utf-8"><body style="margin: 0">
<iframe src="{page}" style="width: {width}px; height: 900px; border: 0"></iframe><pre id="found"></pre>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {{
  const page = frame.contentDocument, view = frame.contentWindow;
  const sizes = (names) => [...page.querySelectorAll(names)].map((e) => e.getBoundingClientRect());
  for (const folded of page.querySelectorAll("details")) folded.open = true;
  document.querySelector("#found").textContent = JSON.stringify({{
    width: view.innerWidth,
    content: page.documentElement.scrollWidth,
    asked: view.performance.getEntriesByType("resource").map((entry) => entry.name),
    marked: page.querySelectorAll("script, img").length,
    headings: sizes("h2").map((box) => box.width * box.height),
    right: Math.max(...sizes("section, figure, svg, .scroll, pre, blockquote, .verdict").map((box) => box.right)),
    charts: sizes("svg").map((box) => Math.min(box.width, box.height)),
    colour: view.getComputedStyle(page.body).backgroundColor,
  }});
}};
</script>"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium here")


def look(page: Path, home: Path, width: int, *flags: str) -> dict:
    """What a browser makes of a page of some width; fails where it says something to the console."""
    frame = home / f"frame-{width}.html"
    frame.write_text(FRAME.format(page=page.as_uri(), width=width))
    words = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    words += ["--allow-file-access-from-files", "--enable-logging=stderr", f"--user-data-dir={home / 'profile'}"]
    words += ["--window-size=1300,1000", *flags, "--dump-dom", frame.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found and found[1], done.stderr
    return json.loads(html.unescape(found[1]))


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """The report of each kind of run, and the comparison of all three."""
    home = tmp_path_factory.mktemp("browser")
    runs = [make_run(home / kind, kind, seed=n) for n, kind in enumerate(("labels", "several", "numbers"))]
    write_comparison(compare(runs), home / "compared.html")
    return {**{run.name: write_report(run) for run in runs}, "compared": home / "compared.html"}


@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("name", ["labels", "several", "numbers", "compared"])
def test_page_in_a_browser(pages, tmp_path, name, width):
    """At the width of a phone and of a desk nothing sticks out of the page, and every heading and chart is seen."""
    found = look(pages[name], tmp_path, width)
    assert found["width"] == width and found["content"] <= width and found["right"] <= width
    assert found["asked"] == [] and found["marked"] == 0
    assert len(found["headings"]) >= 3 and min(found["headings"]) > 0
    assert len(found["charts"]) >= 3 and min(found["charts"]) > 100


def test_what_would_be_found(tmp_path):
    """Control: a page that asks for a picture, runs a script and sticks out is found out."""
    page = tmp_path / "bad.html"
    page.write_text(
        '<!doctype html><h2>x</h2><section style="width: 900px"><svg></svg></section><img src="http://127.0.0.1:9/no.png">'
    )
    found = look(page, tmp_path, 400)
    assert found["content"] > 400 and found["right"] > 400 and found["asked"] and found["marked"] == 1
    page.write_text('<!doctype html><h2>x</h2><svg></svg><script>console.error("oh")</script>')
    with pytest.raises(AssertionError, match="CONSOLE"):
        look(page, tmp_path, 400)


def test_dark(pages, tmp_path):
    """Who prefers dark pages gets one."""
    light, dark = (look(pages["labels"], tmp_path, 400, *flags)["colour"] for flags in ((), (DARK,)))
    assert light == "rgb(247, 247, 245)" and dark == "rgb(19, 22, 27)"
