"""Students, router and frozen teacher in one schedule, and what watches over them."""
