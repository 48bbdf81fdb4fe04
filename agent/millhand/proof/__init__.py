"""Proofs: what was measured of an artifact on a node, signed, and whether an artifact may be believed."""
