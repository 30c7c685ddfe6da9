"""The agent: one process per user and source digest on a host. Standard library only."""
