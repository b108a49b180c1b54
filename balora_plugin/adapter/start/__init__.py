"""Where A0 and B0 come from."""
