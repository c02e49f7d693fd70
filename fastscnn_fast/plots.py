"""Charts, by matplotlib where it is installed (the extra [plot])."""

from __future__ import annotations

import io
from typing import Any

from .extras import need


def figure(inches: tuple[float, float]) -> Any:
    """A matplotlib figure that needs no display.

    Raises:
        ImportError: matplotlib is not installed.
    """
    need("a chart", "plot", "matplotlib")
    from matplotlib.figure import Figure

    return Figure(inches, layout="constrained")


def png(chart: Any, dpi: int) -> bytes:
    """A figure as a PNG file's content."""
    content = io.BytesIO()
    chart.savefig(content, format="png", dpi=dpi)
    return content.getvalue()
