"""The paper's GLUE protocol on a real encoder: clean, with wrong labels, and with one class made rare."""
