"""What a saved model ships: the book's layers, the config, the models, and what of transformers they need to know."""
