"""Bundles: one signed file that installs a node without a network. The form, its verification, and what is laid."""
