"""Reports of evaluations: tables beside the paper's numbers, and a page of items."""
