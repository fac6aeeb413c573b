"""What a run was, for people: one HTML file that needs nothing else, PNG and CSV; a table in the terminal."""
