"""The script that torchrun starts: Python puts a script's directory first on sys.path, and here nothing else lies."""
