"""Races: a package, so that its conftest.py stands next to that of all tests."""
