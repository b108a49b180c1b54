"""One module per framework; each imports the core, never another host."""
