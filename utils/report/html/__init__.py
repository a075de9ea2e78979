"""One HTML page about one run or several: `python tools.py --keyword report RUN...`.

`utils.report.run_files` reads the files of runs, `page` makes figures (with plotly) and tables of them. `page.html`,
`page.css` and `page.js` are the page's sources. The page holds everything, also plotly's script, and loads nothing
from a network.
"""

from __future__ import annotations
