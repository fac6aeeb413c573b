"""What a subnet costs, and what a budget counts."""
