"""How nnU-Net finds our trainers: a start-up file, a folder with one lazy module, and errors in one line."""
