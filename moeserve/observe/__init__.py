"""Metrics, records of status and statistics, and the page."""
