"""Training on many processes, applied from outside: models know nothing of ranks or meshes."""
