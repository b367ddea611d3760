"""Views: figures with fixed axes, one style and alt text."""

from dispersive_kit.views.plots import show, style

__all__ = ["show", "style"]
