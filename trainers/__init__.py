"""The recipes: one short file per paper."""
