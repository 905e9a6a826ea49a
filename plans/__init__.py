"""The planner: nnU-Net's plans made to fit our networks, and the papers' own settings."""
