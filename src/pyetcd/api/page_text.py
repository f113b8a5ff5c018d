"""The page as text: what the files in api/page/ hold, put here by build.py."""

from __future__ import annotations

PAGE_HTML = ""      # page/page.html
PAGE_CSS = ""       # page/page.css
PAGE_JS = ""        # page/page.js
