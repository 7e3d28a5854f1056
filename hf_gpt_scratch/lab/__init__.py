"""What is wrong with my GPT: comparison stage by stage, diagnosis, inspection."""
