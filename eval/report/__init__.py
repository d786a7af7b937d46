"""Results for people: tables, the HTML page, and comparisons of runs."""
