"""Views: figures with fixed axes, one style and alt text."""

from dispersive_kit.views.figures import show, style
from dispersive_kit.views.lessons import show_source
