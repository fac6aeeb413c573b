"""Importance: scores per unit, orders made of them, sorting by the orders, and their file."""
