"""How do parameters change? Losses, GRPO, optimizer, state, jitted steps."""
