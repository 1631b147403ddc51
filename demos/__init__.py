"""Small experiments whose pictures and numbers the documentation shows. Each is a command: `python -m demos.<name>`."""
