"""Opens a page in a headless browser and prints what is seen there, as JSON.

A process of its own: python browser.py PAGE PICTURE WIDTH light|dark
"""

import json
import os
import sys
from pathlib import Path

# For each element that paints something: what it is, its box, and the colour it should have.
LOOK = """
(() => {
  const colour = (element, name) => getComputedStyle(element).getPropertyValue(name);
  const box = (element) => { const r = element.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]; };
  const texts = [...document.querySelectorAll("h1, h2, p, th, td, li")].filter((e) => e.textContent.trim());
  return JSON.stringify({
    scroll_width: document.documentElement.scrollWidth,
    width: window.innerWidth,
    bars: [...document.querySelectorAll(".bar")].map((e) => ({
      share: e.style.width, box: box(e), track: box(e.parentElement), colour: colour(e, "background-color"),
    })),
    texts: texts.map((e) => ({ text: e.textContent, box: box(e), colour: colour(e, "color") })),
    background: colour(document.querySelector(".apack"), "background-color"),
  });
})()
"""


def main(page: str, picture: str, width: int, scheme: str) -> None:
    os.environ["QT_QPA_PLATFORM"] = "offscreen"
    os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = (
        f"--no-sandbox --disable-gpu --blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    )
    from PyQt6.QtCore import QTimer, QUrl
    from PyQt6.QtWebEngineCore import QWebEnginePage
    from PyQt6.QtWebEngineWidgets import QWebEngineView
    from PyQt6.QtWidgets import QApplication

    said: list[str] = []

    class Page(QWebEnginePage):
        def javaScriptConsoleMessage(self, level, message, line, source):
            said.append(message)

    application = QApplication(sys.argv[:1])
    view = QWebEngineView()
    view.setPage(Page(view))
    view.resize(width, 1200)

    def seen(found: str) -> None:
        image = view.grab().toImage()
        image.save(picture)
        looked = json.loads(found) | {"console": said}
        for bar in looked["bars"]:
            x, y, wide, high = bar["box"]
            inside = 0 <= y < image.height() - high
            bar["painted"] = image.pixelColor(round(x + wide / 2), round(y + high / 2)).getRgb()[:3] if inside else None
        looked["corner"] = image.pixelColor(0, 0).getRgb()[:3]
        print(json.dumps(looked))
        application.quit()

    # a frame after the load: what is measured has been laid out and painted
    view.loadFinished.connect(lambda _: QTimer.singleShot(500, lambda: view.page().runJavaScript(LOOK, seen)))
    view.load(QUrl.fromLocalFile(str(Path(page).resolve())))
    view.show()
    sys.exit(application.exec())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
