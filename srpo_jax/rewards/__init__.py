"""What is a completion worth? Blocks, answers, verification, reward terms."""
