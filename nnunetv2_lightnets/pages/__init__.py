"""What the pages of a comparison and of costs share: style, charts, numbers in words, templates."""
