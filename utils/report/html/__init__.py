"""One HTML page about one run or several: `python tools.py --keyword report RUN...`.

`runs` reads what runs have left, `page` makes figures (with plotly) and tables of it, `page.html`, `page.css` and
`page.js` are what the page is made of. It holds all of them, plotly's script too, and asks no network for anything.
"""

from __future__ import annotations
