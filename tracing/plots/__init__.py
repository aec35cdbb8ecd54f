"""Pictures of what tracing found, as PNG."""
