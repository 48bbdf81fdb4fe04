"""The central hub: receives what nodes report, keeps each row once, acknowledges after its own commit."""
