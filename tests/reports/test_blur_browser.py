# ruff: noqa: F401, F811
"""The blur map in a real browser. Needs Chromium: tests/install_browser.sh."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from optimizer.metrics import blur
from optimizer.reports.html import blur_map
from tests.metrics.test_blur import found  # a fixture

pytestmark = pytest.mark.slow
NAMES = ("chromium", "chromium-browser", "google-chrome")


def browser(folder: Path, *flags: str) -> str:
    name = next((name for name in NAMES if shutil.which(name)), None)
    if name is None:
        pytest.fail(f"No browser ({', '.join(NAMES)}): run tests/install_browser.sh.")
    command = [
        name,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder}/own",
    ]
    done = subprocess.run([*command, *flags], capture_output=True, timeout=180, check=True)
    return done.stdout.decode()


def with_script(text: str, script: str) -> str:
    return text.replace("</body>", f"<script>{script}</script></body>")


def test_a_foreign_script_does_not_run(found: blur.Map, tmp_path: Path) -> None:
    text = blur_map.render(found, "t", 3)
    file = tmp_path / "page.html"
    file.write_text(with_script(text, "document.title = 'foreign'"), encoding="utf-8")
    dom = browser(tmp_path, "--dump-dom", file.as_uri())
    assert "<title>foreign" not in dom
    assert "<title>Blur map" in dom


def test_choosing_a_token_shows_its_words(found: blur.Map, tmp_path: Path) -> None:
    text = re.sub(
        r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", blur_map.render(found, "t", 3)
    )
    index = 30
    click = f"document.querySelector('span[data-i=\"{index}\"]').click()"
    file = tmp_path / "page.html"
    file.write_text(with_script(text, click), encoding="utf-8")
    dom = browser(tmp_path, "--dump-dom", file.as_uri())
    panel = re.search(r'<aside id="panel"([^>]*)>(.*?)</aside>', dom, re.DOTALL)
    assert panel is not None
    assert "hidden" not in panel.group(1)
    shown = html.unescape(panel.group(2))
    token = found.worst_token(found.units[index])
    assert found.spelling[int(found.plan.words[token, 0])] in shown
    assert f"KL {found.plan.kl[token]:.3f}" in shown
    assert dom.count('class="on"') + dom.count(' on"') == len(found.others)


@pytest.mark.parametrize("width", [1200, 500])
def test_nothing_sticks_out_of_the_window(
    found: blur.Map,
    tmp_path: Path,
    width: int,
) -> None:
    text = re.sub(
        r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", blur_map.render(found, "t", 3)
    )
    measure = (
        "document.title = 'width ' + (document.documentElement.scrollWidth <= innerWidth) + ' ' +"
        "[...document.querySelectorAll('.row:first-child .text')].filter(x => x.offsetParent).length"
    )
    file = tmp_path / "page.html"
    file.write_text(with_script(text, measure), encoding="utf-8")
    dom = browser(tmp_path, f"--window-size={width},900", "--dump-dom", file.as_uri())
    panes_shown = 2 if width > 704 else 1
    assert f"<title>width true {panes_shown}</title>" in dom
