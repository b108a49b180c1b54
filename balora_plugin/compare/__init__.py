"""Methods compared on a user's own data: a grid of runs, kept one by one, and what can be said of their differences."""
