"""Data: sources of rows, chat templates, tokenised prompts, and the order in which they are used."""
