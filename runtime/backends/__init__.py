"""What runs the engines: one runner a backend."""
