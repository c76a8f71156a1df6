"""Trials, their store, campaigns, suites."""
