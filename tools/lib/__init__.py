"""What the programs of tools/ share."""
