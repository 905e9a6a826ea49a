"""What adapts to nnU-Net: the base of all trainers, networks as it predicts them, its folders and plans."""
