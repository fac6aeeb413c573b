"""Importance of units and layers, at any layout."""
