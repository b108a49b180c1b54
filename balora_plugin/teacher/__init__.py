"""The teacher's outputs kept on disk."""
