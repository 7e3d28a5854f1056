"""Everything that a saved model ships: the book's layers, the config, the models, and what they need."""
