"""Builds what a node is installed from. Not part of the wheel."""
