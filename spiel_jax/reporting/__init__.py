"""Runs as a page to look at: what their folders hold, charts of it, and how these are drawn."""
