"""The decoding lab: is what a class of your own generates what its own forward pass says?"""
