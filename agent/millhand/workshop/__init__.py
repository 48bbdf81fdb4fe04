"""The workshop: makes candidates of a model, proves each, and keeps what passes the gate (docs/decisions/0011)."""
