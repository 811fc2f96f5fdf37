"""Breakers in other libraries, one module for each library. A module needs the extra of its name."""
