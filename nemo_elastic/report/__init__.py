"""What a run was, for people: one HTML file that needs nothing else, PNG figures and CSV files; a table in the terminal."""
