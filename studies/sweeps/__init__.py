"""What the runs of a sweep say together: one table and one plot, whichever engine made them."""
