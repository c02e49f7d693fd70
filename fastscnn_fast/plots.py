"""Charts, by matplotlib where it is installed (the extra [plot])."""

from __future__ import annotations

import io
from typing import Any


def figure(inches: tuple[float, float]) -> Any:
    """A matplotlib figure that needs no display.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("charts need matplotlib: pip install 'fastscnn_fast[plot]'") from error
    return Figure(inches, layout="constrained")


def png(chart: Any, dpi: int) -> bytes:
    """A figure as a PNG file's content."""
    content = io.BytesIO()
    chart.savefig(content, format="png", dpi=dpi)
    return content.getvalue()
