"""Starts a whole mesh on one machine and keeps it up."""
