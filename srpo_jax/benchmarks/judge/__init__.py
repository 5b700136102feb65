"""A language model as judge: its client, its cache, the flow of each benchmark."""
