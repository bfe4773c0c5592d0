"""What is kept: tables and plain functions over a connection; SQLite or PostgreSQL."""
