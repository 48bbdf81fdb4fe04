"""Makes models smaller and faster: int8, int4 and mixed precision, with learned rounding."""
