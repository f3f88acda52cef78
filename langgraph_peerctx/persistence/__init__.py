"""The event store and the control database, on SQLite or PostgreSQL."""
