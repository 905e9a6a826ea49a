"""What networks cost: parameters, multiply-accumulates, memory and time; the commands ``networks``, ``benchmark``."""
