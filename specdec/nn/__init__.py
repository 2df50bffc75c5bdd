"""Neural modules."""
