"""batch -> window -> features -> prediction -> alert -> work order."""
