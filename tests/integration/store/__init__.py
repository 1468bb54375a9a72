"""The store, on SQLite and on PostgreSQL: one suite for both."""
