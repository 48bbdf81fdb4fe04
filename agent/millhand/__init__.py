"""millhand: an edge appliance agent for factory GPU nodes."""

__version__ = "0.1.0"
