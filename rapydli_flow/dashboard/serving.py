"""Pages of our own in the Bokeh server of Dask's dashboard, and what they look like."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bokeh.server.tornado import BokehTornado
from distributed.dashboard.components.scheduler import BOKEH_THEME, env
from distributed.dashboard.core import BokehApplication
from distributed.dashboard.scheduler import template_variables
from tornado.ioloop import IOLoop

REFRESH_MS = 700
HEAD = Path(__file__).with_name("page.html")
SHEET = Path(__file__).with_name("page.css")
CARD = {"background": "#fff", "border": "1px solid #e3e8ed", "border-radius": "12px", "padding": "16px 18px 6px"}

log = logging.getLogger(__name__)


def prefix_of(scheduler: Any) -> str | None:
    """What the addresses of a scheduler's pages begin with; None, and a line in the log, if it has no dashboard."""
    served = scheduler.http_application.applications
    dask = next((application for application in served if isinstance(application, BokehTornado)), None)
    if dask is None:
        log.info("no pages of rapydli_flow on this scheduler: it runs without a dashboard")
        return None
    return str(dask.prefix)


def serve(scheduler: Any, prefix: str, path: str, open_page: Callable[..., None]) -> None:
    """Add a page, and its name to the list that the pages of Dask draw their navigation from."""
    words = template_variables(scheduler)
    application = BokehApplication({f"/{path}": open_page}, scheduler, prefix=prefix, template_variables=words)
    scheduler.http_application.add_application(application)
    application.initialize(IOLoop.current())
    application.start()
    words["pages"].append(path)


def fill(doc: Any, extra: dict[str, Any], view: Any, *, title: str) -> None:
    """Make a document of a view, which has a ``root`` and is refreshed as long as somebody looks."""
    doc.title = title
    doc.theme = BOKEH_THEME
    doc.template = env.from_string(HEAD.read_text(encoding="utf-8"))
    doc.template_variables.update(extra)
    doc.add_root(view.root)
    doc.add_periodic_callback(view.refresh, REFRESH_MS)
