"""What a family will be, before a GPU-hour is spent."""
