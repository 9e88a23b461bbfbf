"""Pictures and videos, from whatever a caller names."""
